"""Recurrent token mixers by name: what `model.layers` may say beside 'attention'."""

from longctx.models.mixers.delta_net import DeltaNet
from longctx.models.mixers.gated_delta import GatedDelta
from longctx.models.mixers.kda import KDA
from longctx.models.mixers.linear_attention import GLA, LinearAttention, Retention
from longctx.models.mixers.mamba2 import Mamba2
from longctx.models.mixers.minimal import MinGRU, MinLSTM
from longctx.models.mixers.mlstm import MLSTMBlock
from longctx.models.mixers.rglru import RGLRU
from longctx.models.mixers.rwkv7 import RWKV7

MIXERS: dict[str, type] = {
    'delta_net': DeltaNet,
    'gated_delta': GatedDelta,
    'gla': GLA,
    'kda': KDA,
    'linear_attention': LinearAttention,
    'mamba2': Mamba2,
    'min_gru': MinGRU,
    'min_lstm': MinLSTM,
    'mlstm': MLSTMBlock,
    'retention': Retention,
    'rglru': RGLRU,
    'rwkv7': RWKV7,
}
