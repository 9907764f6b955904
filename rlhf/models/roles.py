"""Policy, value, reward and reference on one frozen base, each an adapter (or, in full tuning, a model of its own).

A *trunk* is a loaded language model; a *role* names the trunk it runs on and the adapter it switches on there:

    LoRA policy, LoRA reward model   policy, value and reward are adapters on `base`, the reference is `base` without
    LoRA policy, full reward model   value is an adapter on the frozen reward trunk, as in Sun, Gupta & Iyyer 2023
    full policy (lora=none)          policy and value are trainable trunks; reward and reference stay on `base`

The switch is ours because peft's own (`set_adapter`, leaving `disable_adapter`) sets requires_grad=False on every other
adapter, so that a reference pass would silently freeze the value function. Ours touches nothing but which adapter runs.
"""

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers import PreTrainedModel

from rlhf.errors import ModelError
from rlhf.models import unpadded
from rlhf.models.fused_lora import fuse
from rlhf.models.heads import ScalarHead, TokenStats, token_stats
from rlhf.models.logits import head_of
from rlhf.models.sequences import Sequences, filled, length_buckets, spans


class Role(NamedTuple):
    """Which trunk a role runs on and the adapter it switches on there (None: the trunk as it is)."""

    trunk: str
    adapter: str | None


class Roles(nn.Module):
    """The trunks, the heads and the table that says which role is what.

    `compute_dtype` is that of the matrix products (autocast when it is not float32); adapters and heads stay float32.
    """

    def __init__(self, base: PreTrainedModel, compute_dtype: torch.dtype = torch.float32):
        super().__init__()
        self.trunks = nn.ModuleDict({"base": base})
        self.heads = nn.ModuleDict()
        self.table = {"reference": Role("base", None)}
        self.compute_dtype = compute_dtype
        self.compiled: dict[str, Any] | None = None  # how torch.compile was called, if it was
        self._blocks: list[nn.Module] = []  # the compiled ones
        self.sharded = False  # whether the base is spread over processes (`rlhf.models.sharding`)
        self._layers: dict[str, list[LoraLayer]] = {"base": []}
        self._unpadded: dict[str, bool] = {}  # of the trunks that were tried out

    @property
    def device(self) -> torch.device:
        """Where the base is."""
        return self.trunk("reference").device

    @property
    def hidden_size(self) -> int:
        """Width of the last hidden states."""
        return width_of(self.trunk("reference"))

    def trunk(self, role: str) -> PreTrainedModel:
        """The language model that `role` runs on."""
        return self.trunks[self.table[role].trunk]

    def output(self, role: str) -> nn.Module:
        """What makes logits of the last hidden states of the role's trunk."""
        return head_of(self.trunk(role))

    def add_trunk(self, name: str, model: PreTrainedModel) -> None:
        """Take in another model; a role that shall run on it is entered in `table`."""
        self.trunks[name] = model.to(self.device)
        self._layers[name] = []

    def add_adapter(self, trunk: str, name: str, config: LoraConfig) -> None:
        """Inject a fresh LoRA (a no-op until trained, B = 0), in float32.

        Raises:
            ValueError: no module of the trunk matches `config.target_modules` (peft's message names them).
        """
        inject_adapter_in_model(config, self.trunks[trunk], adapter_name=name)
        for parameter in self.adapter_parameters(trunk, name).values():
            parameter.data = parameter.data.float()
        fuse(self.trunks[trunk])
        self._layers[trunk] = [module for module in self.trunks[trunk].modules() if isinstance(module, LoraLayer)]

    def adapter_parameters(self, trunk: str, name: str) -> dict[str, nn.Parameter]:
        """The adapter's parameters by their path in the trunk, without the adapter's name in it."""
        marker = f".{name}."
        return {
            key.replace(marker, "."): value
            for key, value in self.trunks[trunk].named_parameters()
            if marker in key and ".lora_" in key
        }

    def train_only(self, *roles: str) -> None:
        """Exactly these roles' adapters (whole trunks where a role has none) and heads require a gradient."""
        self.requires_grad_(False)
        for role in roles:
            trunk, adapter = self.table[role]
            owner = (
                self.trunks[trunk].parameters() if adapter is None else self.adapter_parameters(trunk, adapter).values()
            )
            for parameter in owner:
                parameter.requires_grad_(True)
            if role in self.heads:
                self.heads[role].requires_grad_(True)

    def add_head(self, role: str, zero: bool) -> ScalarHead:
        """A scalar head on the role's hidden states, trainable."""
        self.heads[role] = ScalarHead(width_of(self.trunk(role)), zero).to(self.device)
        return self.heads[role]  # type: ignore[return-value]

    def copy_trunk(self, role: str) -> PreTrainedModel:
        """A deep copy of the role's trunk with its adapter merged in and no LoRA layers left, in float32."""
        trunk, adapter = self.table[role]
        model = copy.deepcopy(self.trunks[trunk])
        for path, module in list(model.named_modules()):
            if isinstance(module, LoraLayer):
                linear = module.get_base_layer()
                if adapter in module.lora_A:
                    linear.weight.data = linear.weight.data.float() + module.get_delta_weight(adapter)
                parent = model.get_submodule(path.rpartition(".")[0])
                setattr(parent, path.rpartition(".")[2], linear)
        for mark in ("peft_config", "_hf_peft_config_loaded"):
            model.__dict__.pop(mark, None)
        return model.float()

    @contextmanager
    def using_adapter(self, role: str) -> Iterator[PreTrainedModel]:
        """The role's trunk with its adapter, and no other, switched on: microseconds, and no requires_grad touched."""
        trunk, adapter = self.table[role]
        with _switched(self._layers[trunk], adapter):
            yield self.trunks[trunk]

    def checkpoint_activations(self) -> None:
        """Recompute activations in the backward pass instead of keeping them, with the adapter they were made with."""
        for name, trunk in self.trunks.items():

            def contexts(layers: list[LoraLayer] = self._layers[name]) -> tuple[Any, Any]:
                # the backward pass runs after the switch was put back
                off = not layers or layers[0]._disable_adapters
                return nullcontext(), _switched(layers, None if off else layers[0]._active_adapter[0])

            trunk.gradient_checkpointing_enable({"use_reentrant": False, "context_fn": contexts})  # type: ignore[operator]
            for block in trunk.modules():
                if (checkpoint := getattr(block, "_gradient_checkpointing_func", None)) is not None:
                    # the compiler, which would take it in, knows no `contexts`: such updates are not compiled
                    block._gradient_checkpointing_func = torch.compiler.disable(checkpoint)

    def compile_blocks(self, backend: str = "inductor") -> None:
        """Have torch.compile fuse what lies between the matrix products: of every trunk's blocks, and of decoding.

        Raises:
            ModelError: a model does not say what its blocks are.
        """
        _ = self.unpadded  # tried out before, since it changes what is compiled
        self.compiled = {"backend": backend, "dynamic": True}
        for trunk in self.trunks.values():
            blocks = blocks_of(trunk)
            if not blocks:
                name = type(trunk).__name__
                raise ModelError(f"model.compile=true: {name} does not say what its blocks are; allowed: false")
            for block in blocks:
                block.compile(**self.compiled)
            self._blocks += blocks

    @contextmanager
    def uncompiled_blocks(self) -> Iterator[None]:
        """Blocks as they were, for what runs once at its shapes, or is compiled as a whole (`CompiledStep`)."""
        calls = [block._compiled_call_impl for block in self._blocks]
        for block in self._blocks:
            block._compiled_call_impl = None
        try:
            yield
        finally:
            for block, call in zip(self._blocks, calls, strict=True):
                block._compiled_call_impl = call

    @contextmanager
    def scoring(self, role: str) -> Iterator[None]:
        """Several passes of a role without gradients: float32 adapters are merged for their duration.

        A low-precision base would round the merged matrices, so that scores and updates saw two functions.
        """
        trunk, adapter = self.table[role]
        if adapter is None or self.compute_dtype != torch.float32 or torch.is_grad_enabled():
            yield
            return
        with self.merged(role):
            plain = all(layer._disable_adapters for layer in self._layers[trunk])
            self.table[role] = Role(trunk, None if plain else adapter)
            try:
                yield
            finally:
                self.table[role] = Role(trunk, adapter)

    @contextmanager
    def merged(self, role: str) -> Iterator[PreTrainedModel]:
        """The role's trunk with its adapter added into copies of just the adapted matrices, for decoding.

        Each weight tensor is put back afterwards, not computed back, so that nothing drifts. Quantised matrices cannot
        take an addition, and of sharded ones there is but a share: there the adapter stays an adapter.
        """
        trunk, adapter = self.table[role]
        layers = [layer for layer in self._layers[trunk] if adapter in layer.lora_A]
        if self.sharded or any(not layer.get_base_layer().weight.is_floating_point() for layer in layers):
            with self.using_adapter(role) as model:
                yield model
            return
        pristine = [layer.get_base_layer().weight.data for layer in layers]
        try:
            with torch.no_grad():
                for layer, weight in zip(layers, pristine, strict=True):
                    layer.get_base_layer().weight.data = weight + layer.get_delta_weight(adapter).to(weight)
            with _switched(self._layers[trunk], None):
                yield self.trunks[trunk]
        finally:
            for layer, weight in zip(layers, pristine, strict=True):
                layer.get_base_layer().weight.data = weight

    def hidden(self, role: str, batch: Sequences) -> Float[Tensor, "batch time hidden"]:
        """Last hidden states (after the final norm) of every position.

        No attention mask is needed or given: see `rlhf.models.sequences`.
        """
        with self.using_adapter(role) as model, self.autocast():
            return model.base_model(
                input_ids=batch.ids, position_ids=batch.position_ids, use_cache=False
            ).last_hidden_state

    def states(self, role: str, batch: Sequences, where: Bool[Tensor, "batch time"]) -> Float[Tensor, "marked hidden"]:
        """Last hidden states of the marked positions, row after row: without a pass over padding where that pays.

        Compiled blocks see rows of one length end to end as well: they would be compiled once more for [rows, time].
        """
        if not ((batch.ragged or self.compiled) and self.unpadded):
            return self.hidden(role, batch)[where]
        with self.using_adapter(role) as model, self.autocast():
            return unpadded.hidden_states(model, batch, where)

    @property
    def unpadded(self) -> bool:
        """Whether rows of different lengths go through the trunks end to end: on a CPU, if all of them allow it."""
        if self.sharded or self.device.type != "cpu":
            return False
        for name in self.trunks.keys() - self._unpadded.keys():
            with _switched(self._layers[name], None):
                self._unpadded[name] = unpadded.allow(self.trunks[name])
        return all(self._unpadded.values())

    def groups(self, lengths: Sequence[int], budget: int) -> list[list[int]]:
        """Which rows go through a trunk together, for passes of at most `budget` tokens, padding included."""
        return list(filled(lengths, budget) if self.unpadded else length_buckets(lengths, budget))

    def last_token_scores(self, role: str, batch: Sequences) -> Float[Tensor, "batch"]:
        """The role's head at each row's last token: a reward model's score, uncentred."""
        last = spans(batch.lengths - 1, batch.lengths, batch.ids.shape[1])
        return self.heads[role](self.states(role, batch, last))

    def token_stats(
        self,
        role: str,
        hidden: Float[Tensor, "tokens hidden"],
        targets: Int[Tensor, "tokens"],
        temperature: float = 1.0,
        entropy: bool = False,
    ) -> TokenStats:
        """`rlhf.models.heads.token_stats` with the role's language-model head."""
        with self.autocast():
            return token_stats(hidden, self.output(role), targets, temperature, entropy)

    def autocast(self) -> torch.autocast:
        """Matrix products in `compute_dtype`."""
        enabled = self.compute_dtype != torch.float32
        return torch.autocast(self.device.type, dtype=self.compute_dtype if enabled else None, enabled=enabled)


def width_of(model: PreTrainedModel) -> int:
    """Width of the last hidden states, which some models project down from that inside (OPT-350M)."""
    head = model.get_output_embeddings() or getattr(model, "score", None)
    return int(getattr(head, "in_features", None) or model.config.get_text_config().hidden_size)


def blocks_of(model: PreTrainedModel) -> list[nn.Module]:
    """The layers that a model is a stack of; none if it does not say."""
    kinds = set(model._no_split_modules or ())  # transformers' word for them
    return [module for module in model.base_model.modules() if type(module).__name__ in kinds]


@contextmanager
def _switched(layers: list[LoraLayer], adapter: str | None) -> Iterator[None]:
    """These layers run `adapter` alone (None: no adapter), and afterwards what they ran before."""
    before = [(layer._active_adapter, layer._disable_adapters) for layer in layers]
    # past nn.Module.__setattr__, which takes 4 µs a time: 2 ms at 120 layers
    for layer in layers:
        vars(layer).update(_active_adapter=[] if adapter is None else [adapter], _disable_adapters=adapter is None)
    try:
        yield
    finally:
        for layer, (active, disabled) in zip(layers, before, strict=True):
            vars(layer).update(_active_adapter=active, _disable_adapters=disabled)
