"""The exceptions of ZNN: every one a ZnnError that says what was wrong and what was expected."""


class ZnnError(Exception):
    """Base class of every error ZNN raises on purpose."""


class SpecError(ZnnError, ValueError):
    """A network description is wrong; the message names the node or edge, the value and what was expected."""


class DataError(ZnnError, ValueError):
    """An array or a file of data is wrong (dtype, rank, extent, order, non-finite values)."""


class PlanError(ZnnError, ValueError):
    """A plan does not fit the network, or is damaged."""


class CheckpointError(ZnnError, ValueError):
    """A checkpoint is damaged, foreign, or does not fit the network."""


class EngineError(ZnnError, RuntimeError):
    """A task failed while the engine was running."""
