"""Several processes of one run: which one this is, and how they wait for each other.

Independent processes each hold the whole model on their own devices and take rows of their own.
They meet only when the store is opened, and then part: one that dies takes no other with it.
Sharded processes hold one model together, on all their devices, and live and die together.
"""

import dataclasses
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import jax
from absl import logging
from jax._src import distributed  # what `initialize` found out is not public

from gradjax.errors import GradjaxError, first_line

AUTO = "auto"
_STOPPED = "gradjax/stopped/"
# How long one that leaves waits for the others: they come at once, or hear why it gave up.
_LEAVING_SECONDS = 60
_POLL_SECONDS = 0.05


@dataclasses.dataclass
class Processes:
    """The processes of a run, seen from one of them."""

    index: int = 0
    count: int = 1
    sharded: bool = False
    _client: Any = None  # None for a single process, and after parting
    _service: Any = None  # of process 0
    _exchanges: int = 0

    def devices(self) -> list[Any]:
        """The devices that one model is laid out on."""
        return jax.devices() if self.sharded else jax.local_devices()

    def exchange(self, value: str) -> list[str]:
        """Every process's value, in their order, once all have given one.

        Raises:
          GradjaxError: if one of them has stopped, with its reason.
        """
        if not self._client:
            return [value]
        self._exchanges += 1
        here = f"gradjax/{self._exchanges}/"
        try:
            self._client.key_value_set(f"{here}{self.index}", value)
            while len(given := self._client.key_value_dir_get(here)) < self.count:
                for _, reason in self._client.key_value_dir_get(_STOPPED):
                    raise GradjaxError(f"another process of this run has stopped: {reason}")
                time.sleep(_POLL_SECONDS)
        except jax.errors.JaxRuntimeError as error:
            raise GradjaxError(
                f"process {self.index} of {self.count} has lost the others "
                f"({first_line(error)}); see their logs, and start all of them again"
            ) from error
        return [value for _, value in sorted(given, key=lambda pair: int(pair[0].split("/")[-1]))]

    def barrier(self) -> None:
        """Returns once all processes have called it; raises as `exchange`."""
        self.exchange("")

    def require_same(self, what: str) -> None:
        """Raises GradjaxError unless all processes say the same."""
        if len(set(self.exchange(what))) > 1:
            raise GradjaxError(
                "the processes of this run differ in flags, data, model or number of devices; "
                "start all of them with the same ones"
            )

    def stopped(self, reason: str) -> None:
        """Lets the others, who may be waiting, know that this one gives up."""
        if self._client:
            with suppress(jax.errors.JaxRuntimeError):
                self._client.key_value_set(f"{_STOPPED}{self.index}", reason)

    def part(self) -> None:
        """Ends what ties independent processes together, once all have come here."""
        if self._client and not self.sharded:
            client, service, self._client, self._service = self._client, self._service, None, None
            try:
                client.shutdown()
                if service:
                    service.shutdown()
            except jax.errors.JaxRuntimeError as error:
                logging.warning("Another process has stopped already: %s", error)


@contextmanager
def join(
    coordinator_address: str | None,
    num_processes: int | None,
    process_id: int | None,
    *,
    sharded: bool,
) -> Iterator[Processes]:
    """Joins the other processes of the run, before any device is opened; alone without an address.

    Args:
      coordinator_address: HOST:PORT of process 0, or `auto` for what JAX detects (TPU pods, Slurm,
        Open MPI, Kubernetes).
      num_processes: all of them; detected under `auto`.
      process_id: this one, from 0; detected under `auto`.
      sharded: one model over all processes' devices.

    Raises:
      GradjaxError: if the others cannot be found or reached.
    """
    if coordinator_address is None:
        yield Processes()
        return
    # The service would catch SIGTERM, with which clusters end a job.
    jax.config.update("jax_enable_preemption_service", False)
    address = None if coordinator_address == AUTO else coordinator_address
    try:
        jax.distributed.initialize(
            address, num_processes, process_id, shutdown_timeout_seconds=_LEAVING_SECONDS
        )
    except (jax.errors.JaxRuntimeError, RuntimeError, ValueError) as error:
        raise GradjaxError(
            f"--coordinator_address={coordinator_address}: the run's processes did not come "
            f"together ({first_line(error)}); start all of them, with the same address "
            "and --num_processes and each with its own --process_id, or auto on a TPU pod or "
            "under Slurm"
        ) from error
    state = distributed.global_state
    processes = Processes(state.process_id, state.num_processes, sharded, state.client)
    if not sharded:
        # Devices are opened as by a single process: those of the others are not waited for.
        processes._service, state.client, state.service = state.service, None, None
        state.process_id, state.num_processes = 0, 1
    logging.info("Process %d of %d", processes.index, processes.count)
    try:
        yield processes
    except BaseException as error:
        processes.stopped(str(error) or type(error).__name__)
        processes.part()
        raise
    processes.part()  # where nothing was left to do
    if sharded:
        jax.distributed.shutdown()
