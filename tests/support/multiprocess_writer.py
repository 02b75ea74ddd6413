"""One of several JAX processes that write a checkpoint together, as the hosts of a TPU slice do.

    python multiprocess_writer.py ADDRESS PROCESSES PROCESS SOURCE_ITEMS TARGET_STEP

Every leaf is sharded over the devices of all processes where its first axis divides, and replicated otherwise; each process writes its own
`ocdbt.process_<n>`.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any


def main(address: str, processes: int, process: int, source: Path, target: Path) -> None:
    """Writes the target."""
    import jax

    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(address, processes, process)
    import numpy as np
    import orbax.checkpoint as ocp
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    from support.checkpoints import read_orbax

    mesh = Mesh(np.array(jax.devices()), ("fsdp",))

    def spread(values: Any) -> jax.Array:
        values = np.asarray(values)
        split = values.ndim > 0 and values.shape[0] % jax.device_count() == 0
        sharding = NamedSharding(mesh, PartitionSpec("fsdp") if split else PartitionSpec())
        return jax.make_array_from_callback(values.shape, sharding, lambda index: values[index])

    tree = jax.tree.map(spread, read_orbax(source))
    handler = ocp.PyTreeCheckpointHandler(use_zarr3=True)
    with ocp.Checkpointer(ocp.CompositeCheckpointHandler(items=handler)) as checkpointer:
        checkpointer.save(target, args=ocp.args.Composite(items=ocp.args.PyTreeSave(tree)))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4]), Path(sys.argv[5]))
