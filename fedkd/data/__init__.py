"""Sources of records, their partition among devices, and the public (proxy) inputs that devices answer.

The walk: `load` reads a source into a train and a test set; `build_proxy` makes the public set, taking it out
of the train set first where it is a held-out part; `partition` deals the rest to the devices; `standardise`
scales each device's records by its own statistics where the experiment asks for that. `prepare` does the four
in order.

No statistic ever passes from one device to another: see `fedkd.data.scaling` for the three ways to scale
inputs.
"""

from fedkd.data.config import DataConfig, PartitionConfig, ProxyConfig
from fedkd.data.dataset import Dataset, Split
from fedkd.data.partitions import describe, partition
from fedkd.data.prepare import Federation, prepare, standardise
from fedkd.data.proxy import ProxySet, build_proxy, decode_inputs, encode_inputs, identity_of
from fedkd.data.scaling import Standardiser
from fedkd.data.sources import SOURCES, load

__all__ = [
    "SOURCES",
    "DataConfig",
    "Dataset",
    "Federation",
    "PartitionConfig",
    "ProxyConfig",
    "ProxySet",
    "Split",
    "Standardiser",
    "build_proxy",
    "decode_inputs",
    "describe",
    "encode_inputs",
    "identity_of",
    "load",
    "partition",
    "prepare",
    "standardise",
]
