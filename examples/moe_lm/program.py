"""The compiled parts of a run: initial state, training step, evaluation, sampling."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from moe_lm.config import ModelConfig, TrainConfig
from moe_lm.model import EXPERT_AXIS, TOKEN_AXES, ExpertParam, Load, MoeLM


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class State:
    """All that training changes on the devices; the step count lives in the optimizer's state."""

    params: nnx.State
    opt_state: optax.OptState


@dataclasses.dataclass(frozen=True)
class Program:
    """One model on one mesh.

    Attributes:
      abstract_state: shapes, dtypes and shardings of a State, for restoring a checkpoint.
      windows: the sharding of a batch of windows [B, S + 1].
      init: () -> State.
      step: (State, windows) -> (State, loss, Load); the State given is donated.
      evaluate: (params, windows, shuffle key or None) -> (loss, Load).
      sample: (params, tokens [B, S], length of the prompt, key) -> tokens [B, S].
    """

    abstract_state: State
    windows: NamedSharding
    init: Callable[..., Any]
    step: Callable[..., Any]
    evaluate: Callable[..., Any]
    sample: Callable[..., Any]


def make_mesh(num_ep: int | None, num_dp: int | None) -> Mesh:
    """A mesh ("data", "expert"). By default: all GPUs in one EP group; two groups on CPUs."""
    num_devices = jax.device_count()
    num_dp = num_dp or (1 if jax.default_backend() == "gpu" or num_devices == 1 else 2)
    num_ep = num_ep or max(num_devices // num_dp, 1)
    if num_ep * num_dp > num_devices:
        raise ValueError(
            f"ep={num_ep} times dp={num_dp} needs {num_ep * num_dp} devices, there are "
            f"{num_devices}"
        )
    if jax.process_count() > 1 and num_ep * num_dp < num_devices:
        raise ValueError(
            f"ep={num_ep} times dp={num_dp} leaves devices of some of the {jax.process_count()} "
            f"processes out: all {num_devices} must take part. Start fewer processes"
        )
    devices = jax.devices()[: num_ep * num_dp]
    auto = (AxisType.Auto, AxisType.Auto)
    return jax.make_mesh((num_dp, num_ep), TOKEN_AXES, axis_types=auto, devices=devices)


def make_program(model_config: ModelConfig, train_config: TrainConfig, mesh: Mesh) -> Program:
    """The functions of a run, jitted; nothing is compiled or allocated before they are called."""

    def new_params() -> nnx.State:
        return nnx.state(MoeLM(model_config, mesh, nnx.Rngs(train_config.seed)))

    def init() -> State:
        params = new_params()
        return State(params, optimizer.init(params))

    optimizer = make_optimizer(train_config)
    graph = nnx.graphdef(nnx.eval_shape(lambda: MoeLM(model_config, mesh, nnx.Rngs(0))))
    abstract = jax.eval_shape(init)
    shardings = state_shardings(abstract, mesh)
    replicated = NamedSharding(mesh, P())
    step, evaluate, sample = make_functions(graph, optimizer, train_config)
    return Program(
        abstract_state=jax.tree.map(
            lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
            abstract,
            jax.tree.broadcast(shardings, abstract),
        ),
        windows=NamedSharding(mesh, P(TOKEN_AXES)),
        init=jax.jit(init, out_shardings=shardings),
        step=jax.jit(step, donate_argnums=0, out_shardings=(shardings, replicated, replicated)),
        evaluate=jax.jit(evaluate, out_shardings=replicated),
        sample=jax.jit(sample, out_shardings=replicated),
    )


def make_functions(
    graph: nnx.GraphDef, optimizer: optax.GradientTransformation, config: TrainConfig
) -> tuple[Callable[..., Any], ...]:
    """step, evaluate and sample as pure functions, as `Program` describes them."""

    def evaluate(
        params: nnx.State, windows: jax.Array, shuffle_key: jax.Array | None = None
    ) -> tuple[jax.Array, Load]:
        model = nnx.merge(graph, params)
        logits, load = model(windows[:, :-1], shuffle_key=shuffle_key)
        targets = windows[:, 1:].astype(jnp.int32)
        return optax.softmax_cross_entropy_with_integer_labels(logits, targets).mean(), load

    def objective(
        params: nnx.State, windows: jax.Array
    ) -> tuple[jax.Array, tuple[jax.Array, Load]]:
        loss, load = evaluate(params, windows)
        return loss + config.balance * load.balance.mean(), (loss, load)

    def step(state: State, windows: jax.Array) -> tuple[State, jax.Array, Load]:
        grads, (loss, load) = jax.grad(objective, has_aux=True)(state.params, windows)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        return State(optax.apply_updates(state.params, updates), opt_state), loss, load

    def sample(
        params: nnx.State, tokens: jax.Array, num_prompt: jax.Array, key: jax.Array
    ) -> jax.Array:
        """Fills tokens[:, num_prompt:]. Causal attention: what stands there before is not seen."""

        def add(i: jax.Array, tokens: jax.Array) -> jax.Array:
            logits, _ = nnx.merge(graph, params)(tokens)
            following = jax.random.categorical(jax.random.fold_in(key, i), logits[:, i - 1])
            return tokens.at[:, i].set(following.astype(tokens.dtype))

        return jax.lax.fori_loop(num_prompt, tokens.shape[1], add, tokens)

    return step, evaluate, sample


def make_optimizer(config: TrainConfig) -> optax.GradientTransformation:
    """AdamW with clipping and warmup-cosine; no decay of norms, which have one dimension."""
    warmup_steps = max(1, round(config.warmup * config.steps))
    schedule = optax.warmup_cosine_decay_schedule(
        0.0, config.learning_rate, warmup_steps, max(config.steps, warmup_steps + 1)
    )
    adamw = optax.adamw(
        schedule,
        weight_decay=config.weight_decay,
        mask=lambda params: jax.tree.map(lambda leaf: leaf.ndim > 1, params),
    )
    return optax.chain(optax.clip_by_global_norm(config.clip_norm), adamw)


def state_shardings(state: State, mesh: Mesh) -> State:
    """Expert parameters and their moments over the EP axis, all else on every device."""

    def sharding(leaf: Any) -> NamedSharding:
        return NamedSharding(mesh, P(EXPERT_AXIS) if isinstance(leaf, ExpertParam) else P())

    return jax.tree.map(sharding, state, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable))
