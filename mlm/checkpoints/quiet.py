"""Keeps Orbax's own log lines off the user's screen: whatever matters reaches the user as a CheckpointError."""

import logging

import absl.logging  # its logger "absl" must exist before the filter is added


def silence_orbax() -> None:
    """Drops log records that come from Orbax; other users of absl's logger (SeqIO, for one) are heard as before."""
    logger = absl.logging.get_absl_logger()
    if _from_elsewhere not in logger.filters:
        logger.addFilter(_from_elsewhere)


def _from_elsewhere(record: logging.LogRecord) -> bool:
    return "/orbax/" not in record.pathname.replace("\\", "/") or record.levelno >= logging.CRITICAL
