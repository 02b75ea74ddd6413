"""The offline route: MaxText's own `to_huggingface` on a checkpoint of benchmarks/load.py. Runs in MaxText's environment.

    mt/bin/python benchmarks/offline.py ITEMS OUT CONFIG_DIR MODEL_NAME KEY=VALUE…

`benchmarks/load.py --maxtext mt/bin/python` calls it. Prints the seconds from start to written files, without the imports, and the highest
resident set over the one before.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=1"


def main(items: str, out: str, config_dir: str, model_name: str, *overrides: str) -> None:
    """Converts, and prints one line of JSON."""
    import jax
    from maxtext.checkpoint_conversion import to_huggingface  # type: ignore[import-not-found]  # MaxText needs an environment of its own
    from transformers import AutoConfig

    jax.config.update("jax_default_prng_impl", "unsafe_rbg")
    # The cut-down model's configuration in place of the published one's; its directory holds a tokenizer, too.
    to_huggingface.HF_MODEL_CONFIGS[model_name] = AutoConfig.from_pretrained(config_dir)
    to_huggingface.FLAGS(["to_huggingface", f"--hf_model_path={config_dir}"])
    base_yml = Path(to_huggingface.__file__).parents[1] / "configs" / "base.yml"
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    started = time.perf_counter()
    to_huggingface.main(
        [
            "to_huggingface",
            str(base_yml),
            f"model_name={model_name}",
            f"load_parameters_path={items}",
            f"base_output_directory={out}",
            "override_model_config=true",
            "scan_layers=true",
            "use_multimodal=false",
            "hardware=cpu",
            "skip_jax_distributed_system=true",
            "log_config=false",
            *overrides,
        ]
    )
    seconds = time.perf_counter() - started
    peak = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    print("RESULT " + json.dumps({"seconds": seconds, "peak_bytes": peak}), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
