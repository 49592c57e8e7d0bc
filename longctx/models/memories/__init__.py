"""Long-term memories by name: what `model.long_term` may say."""

from longctx.models.memories.armt import ARMT
from longctx.models.memories.base import Block
from longctx.models.memories.block_recurrent import BlockRecurrent
from longctx.models.memories.compressive import Compressive
from longctx.models.memories.infini import Infini
from longctx.models.memories.memorizing import Memorizing
from longctx.models.memories.memory_caching import MemoryCaching
from longctx.models.memories.rmt import RMT
from longctx.models.memories.titans import Titans
from longctx.models.memories.ttt import TTT

MEMORIES: dict[str, type[Block]] = {
    'none': Block,
    'infini': Infini,
    'compressive': Compressive,
    'memorizing': Memorizing,
    'block_recurrent': BlockRecurrent,
    'armt': ARMT,
    'rmt': RMT,
    'memory_caching': MemoryCaching,
    'titans': Titans,
    'ttt': TTT,
}
