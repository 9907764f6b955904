"""Policy, value, reward and reference as roles on shared language models.

A *trunk* is a loaded language model. A *role* names the trunk it runs on and the adapter that is active there:

    LoRA policy, LoRA reward model   policy, value and reward are adapters on `base`; the reference is `base` alone
    LoRA policy, full reward model   value is an adapter on the frozen reward trunk, as in Sun, Gupta & Iyyer 2023
    full policy (lora=none)          policy and value are trainable trunks; reward and reference stay on `base`
"""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers import PreTrainedModel

from rlhf.errors import ModelError
from rlhf.models import adapters, unpadded
from rlhf.models.architecture import hidden_size_of
from rlhf.models.blocks import checkpoint_activations, compile_block, transformer_blocks, uncompiled
from rlhf.models.heads import ScalarHead, TokenStats, token_stats
from rlhf.models.logits import head_of
from rlhf.models.sequences import Sequences, filled, frozen_tokens, length_buckets, select, send, spans

MOVING_REFERENCE = "moving_reference"  # the role of a reference that is not the SFT model


class Role(NamedTuple):
    """The trunk a role runs on and the adapter that is active there (None: no adapter)."""

    trunk: str
    adapter: str | None


class Roles(nn.Module):
    """The trunks, the scalar heads, and the table that maps each role to its trunk and adapter.

    `compute_dtype` is the dtype of matrix products (autocast unless float32). Adapters and heads stay in float32.
    """

    def __init__(self, base: PreTrainedModel, compute_dtype: torch.dtype = torch.float32):
        super().__init__()
        self.trunks = nn.ModuleDict({"base": base})
        self.heads = nn.ModuleDict()
        self.table = {"reference": Role("base", None)}
        self.compute_dtype = compute_dtype
        self.compiled: dict[str, Any] | None = None  # the arguments of torch.compile, once `compile_blocks` ran
        self.recomputed = False  # whether activations are recomputed, after `checkpoint_activations`
        self.sharded = False  # whether the base is spread over processes (`rlhf.models.sharding`)
        self._compiled_blocks: list[nn.Module] = []
        self._layers: dict[str, list[LoraLayer]] = {"base": []}  # the LoRA layers of each trunk
        # For the trunks tried so far: None where one cannot run without padding, or else the paths of those modules of
        # its last block that may run on the marked tokens alone.
        self._unpadded: dict[str, list[str] | None] = {}

    # -- properties --------------------------------------------------------------------------------------------------

    @property
    def device(self) -> torch.device:
        """The device of the base."""
        return self.trunk("reference").device

    @property
    def hidden_size(self) -> int:
        """Size of the base's last hidden states."""
        return hidden_size_of(self.trunk("reference"))

    @property
    def in_float32(self) -> bool:
        """Whether all floating-point weights are in float32, and matrix products too, which a GPU may round to TF32.

        Log-probs then do not depend on the shape of the batch. Integer weights are ignored; see `quantized`.
        """
        if self.device.type == "cuda" and torch.get_float32_matmul_precision() != "highest":
            return False
        weights = (parameter for parameter in self.parameters() if parameter.is_floating_point())
        return self.compute_dtype == torch.float32 and all(weight.dtype == torch.float32 for weight in weights)

    @property
    def quantized(self) -> bool:
        """Whether some weights are stored as integers (bitsandbytes' int8 or packed 4-bit)."""
        return not all(parameter.is_floating_point() for parameter in self.parameters())

    def trunk(self, role: str) -> PreTrainedModel:
        """The language model that `role` runs on."""
        return self.trunks[self.table[role].trunk]

    @property
    def penalty_reference(self) -> str:
        """The role that the penalty is measured from: the SFT model, unless the reference moves."""
        return MOVING_REFERENCE if MOVING_REFERENCE in self.table else "reference"

    def output(self, role: str) -> nn.Module:
        """The module that maps last hidden states of the role's trunk to logits."""
        return head_of(self.trunk(role))

    # -- building ----------------------------------------------------------------------------------------------------

    def add_trunk(self, name: str, model: PreTrainedModel) -> None:
        """Add another model; to use it, enter a role that runs on it in `table`."""
        self.trunks[name] = model.to(self.device)
        self._layers[name] = []

    def add_adapter(self, trunk: str, name: str, config: LoraConfig) -> None:
        """Add a new LoRA to a trunk, in float32; it changes nothing until it is trained (B = 0).

        Raises:
            ValueError: no module of the trunk matches `config.target_modules` (peft's message names them).
        """
        self._layers[trunk] = adapters.inject(self.trunks[trunk], name, config)

    def adapter_parameters(self, trunk: str, name: str) -> dict[str, nn.Parameter]:
        """The adapter's parameters, keyed by their path in the trunk without the adapter's name."""
        return adapters.adapter_parameters(self.trunks[trunk], name)

    def adapter_config(self, role: str) -> LoraConfig:
        """The configuration of the role's adapter, with the names of the layers that it is on."""
        trunk, adapter = self.table[role]
        config: LoraConfig = self.trunks[trunk].peft_config[adapter]  # type: ignore[index]
        return config

    def parameters_of(self, role: str) -> dict[str, nn.Parameter]:
        """The parameters of the role's adapter, or of its whole trunk, by their path in the trunk."""
        trunk, adapter = self.table[role]
        return (
            dict(self.trunks[trunk].named_parameters()) if adapter is None else self.adapter_parameters(trunk, adapter)
        )

    def add_head(self, role: str, zero: bool, bias: bool = False) -> ScalarHead:
        """Add a trainable scalar head on the role's hidden states, with zero or random weights, and a bias if asked."""
        self.heads[role] = ScalarHead(hidden_size_of(self.trunk(role)), zero, bias).to(self.device)
        return self.heads[role]  # type: ignore[return-value]

    def copy_trunk(self, role: str) -> PreTrainedModel:
        """A float32 deep copy of the role's trunk with its adapter merged in and no LoRA layers left."""
        trunk, adapter = self.table[role]
        return adapters.merged_copy(self.trunks[trunk], adapter)

    def train_only(self, *roles: str) -> None:
        """Make only these roles' adapters (or whole trunks, for roles without adapter) and heads require gradients."""
        self.requires_grad_(False)
        for role in roles:
            for parameter in self.parameters_of(role).values():
                parameter.requires_grad_(True)
            if role in self.heads:
                self.heads[role].requires_grad_(True)

    def checkpoint_activations(self) -> None:
        """Recompute activations in the backward pass instead of storing them."""
        self.recomputed = True
        for name, trunk in self.trunks.items():
            checkpoint_activations(trunk, self._layers[name])

    def compile_blocks(self, backend: str = "inductor") -> None:
        """Compile the blocks of every trunk with torch.compile, and the decoding step when it is first used.

        Raises:
            ModelError: a model does not declare which modules are its blocks.
        """
        _ = self.unpadded  # find out now: it changes the attention function that is compiled
        self.compiled = {"backend": backend, "dynamic": True}
        for trunk in self.trunks.values():
            blocks = transformer_blocks(trunk)
            if not blocks:
                name = type(trunk).__name__
                raise ModelError(f"model.compile=true: {name} does not say what its blocks are; allowed: false")
            for block in blocks:
                compile_block(block, **self.compiled)
            self._compiled_blocks += blocks

    def uncompiled_blocks(self) -> AbstractContextManager[None]:
        """Run blocks uncompiled: for passes whose shapes occur once, or that are compiled whole (`CompiledStep`)."""
        return uncompiled(self._compiled_blocks)

    # -- switching and merging adapters ------------------------------------------------------------------------------

    @contextmanager
    def using_adapter(self, role: str) -> Iterator[PreTrainedModel]:
        """The role's trunk with only the role's adapter active. Takes microseconds; requires_grad is not touched."""
        trunk, adapter = self.table[role]
        with adapters.selected(self._layers[trunk], adapter):
            yield self.trunks[trunk]

    @contextmanager
    def merged(self, role: str) -> Iterator[PreTrainedModel]:
        """The role's trunk with its adapter merged into copies of the adapted matrices, for decoding.

        The original weights are back on exit, bit for bit. The adapter stays separate where it cannot be merged:
        quantised matrices cannot be added to, and of sharded ones each process holds only a part.
        """
        trunk, adapter = self.table[role]
        layers = self._layers[trunk]
        if self.sharded or not adapters.can_be_merged(layers, adapter):
            with self.using_adapter(role) as model:
                yield model
            return
        with adapters.merged_weights(layers, adapter), adapters.selected(layers, None):
            yield self.trunks[trunk]

    @contextmanager
    def scoring(self, role: str) -> Iterator[None]:
        """Merge the role's adapter for several passes without gradients, if everything is in float32.

        In a low-precision base, merging rounds the matrices: scores and updates would come from different functions.
        """
        trunk, adapter = self.table[role]
        if adapter is None or self.compute_dtype != torch.float32 or torch.is_grad_enabled():
            yield
            return
        with self.merged(role):
            # While the adapter is merged, the role runs without it. `merged` may have left it separate.
            self.table[role] = Role(trunk, adapters.selection(self._layers[trunk]))
            try:
                yield
            finally:
                self.table[role] = Role(trunk, adapter)

    # -- forward passes ----------------------------------------------------------------------------------------------

    def autocast(self) -> torch.autocast:
        """A context in which matrix products are computed in `compute_dtype`."""
        enabled = self.compute_dtype != torch.float32
        return torch.autocast(self.device.type, dtype=self.compute_dtype if enabled else None, enabled=enabled)

    def hidden(self, role: str, batch: Sequences) -> Float[Tensor, "batch time hidden"]:
        """Last hidden states (after the final norm) at every position, padding included.

        No attention mask is needed; see `rlhf.models.sequences`.
        """
        with self.using_adapter(role) as model, self.autocast():
            positions = None if batch.position_ids is None else send(batch.position_ids, self.device)
            return model.base_model(
                input_ids=send(batch.ids, self.device), position_ids=positions, use_cache=False
            ).last_hidden_state

    def states(self, role: str, batch: Sequences, where: Bool[Tensor, "batch time"]) -> Float[Tensor, "marked hidden"]:
        """Last hidden states at the marked positions (a mask on the host), row after row, without padding if possible.

        The last block then computes no more than these need, unless blocks are compiled, of which this would make
        further variants, or recomputed.
        """
        if not self.unpadded:
            return select(self.hidden(role, batch), where)
        alone = None if self.compiled or self.recomputed else self._unpadded[self.table[role].trunk]
        with self.using_adapter(role) as model, self.autocast():
            return unpadded.hidden_states(model, batch, where, alone or ())

    @property
    def unpadded(self) -> bool:
        """Whether `states` lays sequences end to end instead of padding: if every trunk supports it here."""
        if self.sharded or self.device.type not in ("cpu", "cuda"):
            return False
        for name in self.trunks.keys() - self._unpadded.keys():
            with adapters.selected(self._layers[name], None):
                possible = unpadded.allow(self.trunks[name])
                self._unpadded[name] = unpadded.agreeing_row_modules(self.trunks[name]) if possible else None
        return None not in self._unpadded.values()

    def groups(self, lengths: Sequence[int], budget: int, frozen: bool = False) -> list[list[int]]:
        """Split rows into groups for passes of at most `budget` tokens each, counting padding where there is any.

        A frozen pass, which keeps no activations, may have `frozen_tokens` of them.
        """
        budget = frozen_tokens(budget, self.device.type == "cuda") if frozen else budget
        return list(filled(lengths, budget) if self.unpadded else length_buckets(lengths, budget))

    def last_token_scores(self, role: str, batch: Sequences) -> Float[Tensor, "batch"]:
        """The output of the role's head at the last token of each row: a reward model's score, without baseline."""
        last = spans(batch.lengths - 1, batch.lengths, batch.ids.shape[1])
        return self.heads[role](self.states(role, batch, last))

    def token_stats(
        self,
        role: str,
        hidden: Float[Tensor, "tokens hidden"],
        targets: Int[Tensor, "tokens"],
        temperature: float = 1.0,
        entropy: bool = False,
        entropy_grad: bool = False,
    ) -> TokenStats:
        """`rlhf.models.heads.token_stats` with the role's language-model head; `targets` are on the host."""
        with self.autocast():
            targets = send(targets, hidden.device)
            return token_stats(hidden, self.output(role), targets, temperature, entropy, entropy_grad)
