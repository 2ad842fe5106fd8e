"""placeholder"""
from metatrain.config import PrepareConfig
from metatrain.data.sources.rawlog import RawLog


def read_events(config: PrepareConfig) -> RawLog:
    raise NotImplementedError
