"""Why these heads: one input explained, and the roles and uses of heads over a data set."""

from headwise.explain.annotated import (
    AlignedPair,
    AnnotatedBatch,
    Sentence,
    annotate_texts,
    parse_with_spacy,
    read_alignments,
    read_conllu,
)
from headwise.explain.data_set import explain_data
from headwise.explain.document import Explanation
from headwise.explain.head_log import HeadLog, log_heads
from headwise.explain.one_input import explain
from headwise.explain.roles import RoleThresholds, head_roles
from headwise.explain.tracing import Trace, trace

__all__ = [
    "AlignedPair",
    "AnnotatedBatch",
    "Explanation",
    "HeadLog",
    "RoleThresholds",
    "Sentence",
    "Trace",
    "annotate_texts",
    "explain",
    "explain_data",
    "head_roles",
    "log_heads",
    "parse_with_spacy",
    "read_alignments",
    "read_conllu",
    "trace",
]
