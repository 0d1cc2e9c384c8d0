"""The maths of the method on plain tensors: positions, candidate sets, the restricted loss, and the full loss."""

from megatron_replay.ops.full_loss import linear_cross_entropy, target_logprobs
from megatron_replay.ops.local_sets import LocalSets
from megatron_replay.ops.positions import BucketRule, bucket_counts, bucket_edges, position_uniform, select_positions
from megatron_replay.ops.restricted_loss import (
    restricted_cross_entropy,
    restricted_linear_cross_entropy,
    restricted_linear_terms,
)
from megatron_replay.ops.sets import CandidateSets
from megatron_replay.ops.shard import VocabShard
from megatron_replay.ops.topk import dynamic_topk, linear_dynamic_topk

__all__ = [
    "BucketRule",
    "CandidateSets",
    "LocalSets",
    "VocabShard",
    "bucket_counts",
    "bucket_edges",
    "dynamic_topk",
    "linear_cross_entropy",
    "linear_dynamic_topk",
    "position_uniform",
    "restricted_cross_entropy",
    "restricted_linear_cross_entropy",
    "restricted_linear_terms",
    "select_positions",
    "target_logprobs",
]
