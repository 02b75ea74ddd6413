"""Decides whether the hosts of an engine exchange what they read, and brings them together."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import jax
from vllm.logger import init_logger

from vllm_maxtext_loader.checkpoint.exchange.exchange import Exchange
from vllm_maxtext_loader.checkpoint.exchange.rendezvous import NoExchangeError, Terms, meet, stay_away
from vllm_maxtext_loader.checkpoint.exchange.sharing import (
    Assignment,
    assign,
    even_nbytes,
    small_nbytes,
)
from vllm_maxtext_loader.checkpoint.reader import region_limit
from vllm_maxtext_loader.checkpoint.storage.retry import no_progress_seconds
from vllm_maxtext_loader.engine import stores
from vllm_maxtext_loader.options import EXCHANGE_VARIABLE, GIB, is_off

if TYPE_CHECKING:
    from vllm_maxtext_loader.api import Checkpoint
    from vllm_maxtext_loader.tpu.placement import ShardWriter

logger = init_logger("vllm." + __name__)


def begin(
    checkpoint: Checkpoint, shard_writer: ShardWriter, decided: Mapping[str, Any] | None
) -> Exchange | None:
    """The exchange of a load; None where every host reads for itself.

    A disk is read by every host for itself. From a bucket hosts exchange, unless they cannot: then one of them says why, and what
    that costs.

    Args:
        checkpoint: what is loaded.
        shard_writer: what its leaves are placed by.
        decided: what travels in the ModelConfig (`options.SERVED`).
    """
    holdings = shard_writer.holdings()
    hosts, own = holdings.hosts(), jax.process_index()
    if not checkpoint.location.items.is_remote or len(hosts) < 2 or own not in hosts:
        return None
    plan, made = shard_writer.plan, {}

    def assign_within(limit: int) -> Assignment:
        leaves = [entry.leaf for entry in plan.leaves]
        made[limit] = assign(leaves, hosts, limit, holdings, small_nbytes(plan.nbytes))
        return made[limit]

    nbytes = min(region_limit(checkpoint.concurrent_bytes), even_nbytes(plan.nbytes, len(hosts)))
    is_turned_off = is_off(EXCHANGE_VARIABLE)
    try:
        store = stores.find(decided, checkpoint.digest)
        reason = f"{EXCHANGE_VARIABLE} turns the exchange off" if is_turned_off else ""
        address = ""
        try:
            address = store.address()
        except (NoExchangeError, OSError) as error:
            reason = reason or f"its own address is not known ({error})"
        if reason:
            stay_away(store, own, reason)
            raise NoExchangeError(reason)
        terms = Terms(own, hosts, address, nbytes, plan.where, no_progress_seconds())
        peers, assignment = meet(store, terms, assign_within)
        return Exchange(assignment, peers)
    except NoExchangeError as error:
        if own == hosts[0]:
            found = next(iter(made.values()), None) or assign_within(nbytes)
            say = logger.warning if found.is_gain and not is_turned_off else logger.info
            say(
                "%s: every host reads for itself, %.3g GiB in all instead of %.3g: %s",
                plan.where,
                sum(found.alone.values()) / GIB,
                sum(found.read.values()) / GIB,
                error,
            )
        return None
