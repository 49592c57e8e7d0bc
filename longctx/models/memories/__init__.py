"""Long-term memories by name: what `model.long_term` may say."""

from longctx.models.memories.base import Block
from longctx.models.memories.infini import Infini
from longctx.models.memories.memorizing import Memorizing

MEMORIES: dict[str, type[Block]] = {
    'none': Block,
    'infini': Infini,
    'memorizing': Memorizing,
}
