"""A byte-level transformer whose feed-forward layers are Mixtures of Experts, in Flax NNX."""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from moe_lm.config import ModelConfig

import jax_moe_ep as ep

NUM_BYTES = 256
HEAD_SIZE = 32
TOKEN_AXES = ("data", "expert")  # tokens are sharded over both, experts over "expert"
EXPERT_AXIS = "expert"


class ExpertParam(nnx.Param):
    """A parameter with a leading dimension of experts, sharded over the EP axis."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Load:
    """What the MoE layers tell about a batch; [layers] first where all layers are together.

    Attributes:
      balance: float32, 1 for perfectly balanced experts, more otherwise.
      expert_counts: [E] int32, tokens each expert got.
      num_dropped: [] int32, assignments that found no room.
    """

    balance: jax.Array
    expert_counts: jax.Array
    num_dropped: jax.Array


class MoE(nnx.Module):
    """Top-k softmax router and SwiGLU experts."""

    def __init__(self, config: ModelConfig, mesh: Mesh, rngs: nnx.Rngs):
        hidden, inner, experts = config.width, config.inner, config.experts
        init = nnx.initializers.lecun_normal(batch_axis=0)
        # float32 without shortcuts: a rounded score would flip choices between near ties.
        self.router = nnx.Linear(hidden, experts, use_bias=False, precision="highest", rngs=rngs)
        self.w_gate_up = ExpertParam(init(rngs.params(), (experts, hidden, 2 * inner)))
        self.w_down = ExpertParam(init(rngs.params(), (experts, inner, hidden)))
        # Normalized weights of one expert would all be 1.
        self.router_config = ep.RouterConfig(config.top_k, normalize=config.top_k > 1)
        self.config = ep.EpConfig(experts, EXPERT_AXIS, implementation=config.implementation)
        self.mesh = mesh

    def __call__(self, x: jax.Array, shuffle_key: jax.Array | None) -> tuple[jax.Array, Load]:
        routing = ep.route(self.router(x.astype(jnp.float32)), self.router_config)  # of [B, S]
        topk_idx = routing.topk_idx
        if shuffle_key is not None:
            flat = topk_idx.reshape(-1, topk_idx.shape[-1])
            topk_idx = jax.random.permutation(shuffle_key, flat).reshape(topk_idx.shape)
        weights = (self.w_gate_up[...].astype(x.dtype), self.w_down[...].astype(x.dtype))
        y, stats = ep.moe_mlp(
            x, topk_idx, routing.topk_weights, *weights, mesh=self.mesh, config=self.config
        )
        balance = ep.load_balance_loss(routing)
        return y, Load(balance, stats.expert_counts, stats.num_dropped)


class Attention(nnx.Module):
    """Causal self-attention."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        dtype = jnp.dtype(config.dtype)
        self.qkv = nnx.Linear(
            config.width, 3 * config.width, use_bias=False, dtype=dtype, rngs=rngs
        )
        self.out = nnx.Linear(config.width, config.width, use_bias=False, dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        batch, seq, width = x.shape
        qkv = self.qkv(x).reshape(batch, seq, 3, width // HEAD_SIZE, HEAD_SIZE)
        y = jax.nn.dot_product_attention(*jnp.unstack(qkv, axis=2), is_causal=True)
        return self.out(y.reshape(x.shape))


class Block(nnx.Module):
    """Attention and MoE, each after a norm and beside the residual stream."""

    def __init__(self, config: ModelConfig, mesh: Mesh, rngs: nnx.Rngs):
        dtype = jnp.dtype(config.dtype)
        self.attention_norm = nnx.RMSNorm(config.width, dtype=dtype, rngs=rngs)
        self.attention = Attention(config, rngs)
        self.moe_norm = nnx.RMSNorm(config.width, dtype=dtype, rngs=rngs)
        self.moe = MoE(config, mesh, rngs)

    def __call__(self, x: jax.Array, shuffle_key: jax.Array | None) -> tuple[jax.Array, Load]:
        x = x + self.attention(self.attention_norm(x))
        y, load = self.moe(self.moe_norm(x), shuffle_key)
        return x + y, load


class MoeLM(nnx.Module):
    """Bytes [B, S] to logits [B, S, 256] of the next byte."""

    def __init__(self, config: ModelConfig, mesh: Mesh, rngs: nnx.Rngs):
        dtype = jnp.dtype(config.dtype)
        self.tokens = NamedSharding(mesh, P(TOKEN_AXES))
        self.byte_embed = nnx.Embed(NUM_BYTES, config.width, dtype=dtype, rngs=rngs)
        self.position_embed = nnx.Embed(config.seq, config.width, dtype=dtype, rngs=rngs)
        self.blocks = nnx.List([Block(config, mesh, rngs) for _ in range(config.layers)])
        self.norm = nnx.RMSNorm(config.width, dtype=dtype, rngs=rngs)
        self.head = nnx.Linear(config.width, NUM_BYTES, use_bias=False, dtype=dtype, rngs=rngs)

    def __call__(
        self, tokens: jax.Array, *, shuffle_key: jax.Array | None = None
    ) -> tuple[jax.Array, Load]:
        """float32 logits and the load of all layers.

        shuffle_key: an evaluation option. Every layer's expert choices are permuted across the
        tokens of the batch: the experts are as busy as before, but with tokens not meant for them.
        """
        x = self.byte_embed(tokens.astype(jnp.int32))
        x += self.position_embed(jnp.arange(tokens.shape[1]))
        loads = []
        for i, block in enumerate(self.blocks):
            x = jax.lax.with_sharding_constraint(x, self.tokens)
            key = None if shuffle_key is None else jax.random.fold_in(shuffle_key, i)
            x, load = block(x, key)
            loads.append(load)
        logits = self.head(self.norm(x)).astype(jnp.float32)
        return logits, jax.tree.map(lambda *each: jnp.stack(each), *loads)
