"""The model as transformers uses models: loading, saving, generating, fine-tuning."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from operator import attrgetter
from typing import Any, NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GenerationConfig, GenerationMixin, PreTrainedModel
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import can_return_tuple, logging

from mythos.hf.cache import MythosCache
from mythos.hf.config import MythosConfig
from mythos.hf.inputs import (
    CACHE_NAME,
    ForwardInputs,
    check_arguments,
    check_ids,
    document_ids,
    kept_positions,
    token_mask,
)
from mythos.hf.labels import predicted_labels, targets_of
from mythos.model import IGNORE_INDEX
from mythos.model.halting import HaltingGate, HaltingRule, halting_rule
from mythos.model.layers import random_stream
from mythos.model.loss import summed_cross_entropy
from mythos.model.rdt import RecurrentDepthTransformer, TokenEmbedding

DEPTH_ARGUMENTS = ("num_loops", "exit_threshold")
"""Arguments of `generate` and of a generation configuration that transformers does not have."""

logger = logging.get_logger(__name__)


class MythosForCausalLM(PreTrainedModel, GenerationMixin):
    """A `RecurrentDepthTransformer` with transformers' interface.

    Tensors have the same names as in checkpoints. Matmuls are in the type of the parameters; parameters that must not
    be rounded to 16 bits stay float32 whatever `dtype` is requested. The loop runs on one device: `device_map` places
    the whole model.
    """

    config_class = MythosConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    accepts_loss_kwargs = True
    _no_split_modules = ["RecurrentDepthTransformer"]  # noqa: RUF012 (the base class declares an instance attribute)
    _supports_sdpa = True

    def __init__(self, config: MythosConfig) -> None:
        super().__init__(config)
        self.model = RecurrentDepthTransformer(config.section())
        whole = float32_tensors(self.model)
        self._keep_in_fp32_modules_strict = {f"model.{name}" for name in whole}  # for weights that are loaded
        for tensor in whole.values():
            tensor.data = tensor.data.float()  # for weights created under another default type
        if isinstance(self.model.halting, HaltingGate):
            # The gate is not trained here, and DDP would wait for its gradients.
            gate = self.model.halting.named_parameters(prefix="model.halting")
            self._ddp_params_and_buffers_to_ignore = [name for name, _ in gate]
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """The embedding; it is also the head if they are tied."""
        return self.model.embedding

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the embedding by another `TokenEmbedding` of the same size.

        Raises ValueError for any other module: a `TokenEmbedding` scales its rows.
        """
        current = self.model.embedding
        if not isinstance(value, TokenEmbedding) or value.weight.shape != current.weight.shape:
            raise ValueError(
                f"the embedding of a mythos model cannot become a {type(value).__name__}: it is a TokenEmbedding of "
                f"shape {tuple(current.weight.shape)}; change its weight instead"
            )
        self.model.embedding = value

    def get_output_embeddings(self) -> nn.Module | None:
        """The head; None if it is the embedding."""
        return self.model.head

    def resize_token_embeddings(
        self,
        new_num_tokens: int | None = None,
        pad_to_multiple_of: int | None = None,
        mean_resizing: bool = True,
    ) -> NoReturn:
        """Not supported: raises ValueError."""
        raise ValueError(
            f"the vocabulary of a mythos model cannot be resized: it has {self.config.vocab_size} token ids; use a "
            "tokenizer that needs no more"
        )

    @property
    def gradient_checkpointing(self) -> bool:
        """Whether the backward pass recomputes every loop instead of storing activations; transformers sets it."""
        return self.model.recurrence.checkpointing == "loop"

    @gradient_checkpointing.setter
    def gradient_checkpointing(self, enable: bool) -> None:
        self.model.recurrence.checkpointing = "loop" if enable else "none"

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Initialize the tensors that no file provides, seeded by torch's global generator."""
        initializers = getattr(module, "initializers", {})
        for name, tensor in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
            if not getattr(tensor, "_is_hf_initialized", False):
                value = torch.zeros(tensor.shape, dtype=torch.float32, device="cpu")
                if name in initializers:
                    seed = int(torch.randint(2**62, (), device="cpu"))
                    initializers[name](value, random_stream(seed, name))
                tensor.copy_(value)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "MythosForCausalLM":
        """Move or convert all tensors; `to`, `half` and `double` call this.

        With a 16-bit type the tensors of `float32_tensors` stay float32. With float64 all tensors stay float32, with a
        warning, because states are float32.
        """
        before = {name: tensor.detach() for name, tensor in float32_tensors(self.model).items()}
        super()._apply(fn, recurse)
        for name, tensor in float32_tensors(self.model).items():
            if tensor.dtype in (torch.float16, torch.bfloat16):
                retype(tensor, before[name].to(tensor.device, torch.float32))
        double = [tensor for tensor in (*self.parameters(), *self.buffers()) if tensor.dtype == torch.float64]
        for tensor in double:
            retype(tensor, tensor.data.float())
        if double:
            logger.warning("float64: a mythos model computes in float32, bfloat16 or float16; its weights stay float32")
        return self

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: MythosCache | None = None,
        *,
        past_key_values: MythosCache | None = None,
        token_type_ids: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        num_loops: int | None = None,
        exit_threshold: float | None = None,
        output_hidden_states: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        num_items_in_batch: int | Tensor | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Logits of the next token at every position, and the loss if labels are passed.

        Positions count the tokens of each row, so padding anywhere in a row does not change the other positions.

        Args:
            input_ids: (B, S) int64.
            attention_mask: (B, S), 0 at padding; with a cache (B, columns of the cache + S).
            position_ids: (B, S) or (1, S) int64; optional. Without mask and cache, a row whose positions do not count
                on by one contains several documents, which do not attend to each other. Otherwise they must equal the
                positions that the tokens have anyway.
            cache: the cache of earlier passes; these ids continue it.
            past_key_values: older name of `cache`.
            token_type_ids: ignored: some tokenizers return them, and this model has no segments.
            labels: (B, S) int64, the ids themselves, -100 where there is none; shifted here. Labels that padding would
                predict do not count.
            use_cache: also return a cache (default: only if one is passed). It carries no gradient.
            num_loops: passes of the core for every position (default `config.mean_loops`).
            exit_threshold: let the model's halting rule stop positions earlier, at this threshold (default: never).
            output_hidden_states: also return the embedding, the output of each prelude block, the state after each
                loop and the output of each coda block, the last replaced by the head's input. Not with a cache or a
                threshold.
            logits_to_keep: logits at the last so many positions, or at these positions; 0 = all. 1 means the last
                token of each row.
            num_items_in_batch: divisor of the summed loss (default: the number of labels that count).
            kwargs: `shift_labels` (B, S), labels already shifted; `ignore_index`, a second label that does not count
                beside -100. Others are ignored with a warning, as in transformers' models.

        Returns loss (float32 scalar, nats; from `loss_function` if one was set), logits (B, S, config.vocab_size)
        float32, 0 at padding, and hidden states (B, S, D) float32.

        Raises ValueError for invalid values of the arguments above, for the arguments in `UNSUPPORTED_ARGUMENTS`, for a
        cache or threshold in training, and for weights on the meta device or of an unsupported type.
        """
        for name in check_arguments(kwargs, self.config):
            logger.warning_once(f"{name}: ignored, {type(self).__name__}.forward has no such argument")
        cache = past_key_values if cache is None else cache
        use_cache = cache is not None if use_cache is None else use_cache
        with_states = bool(self.config.output_hidden_states if output_hidden_states is None else output_hidden_states)
        depth = self._depth(num_loops, exit_threshold)
        inputs = self._inputs(input_ids, attention_mask, position_ids, cache, use_cache, depth, with_states)
        labels, targets = self._targets(labels, inputs.mask, kwargs)
        custom_loss = targets is not None and self.loss_function is not ForCausalLMLoss
        with self._autocast():
            predict = self._predict if inputs.cache is None else self._predict_cached
            logits, all_logits, loss = predict(inputs, targets, custom_loss, logits_to_keep)
        if custom_loss:
            if num_items_in_batch is not None:
                kwargs["num_items_in_batch"] = num_items_in_batch
            loss = self.loss_function(logits=all_logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        elif loss is not None and targets is not None:
            count = (targets != IGNORE_INDEX).sum() if num_items_in_batch is None else num_items_in_batch
            loss = loss / (count.to(loss.device) if isinstance(count, Tensor) else count)
        states = None if inputs.states is None else tuple(inputs.states)
        returned_cache: dict[str, Any] = {CACHE_NAME: inputs.cache if use_cache else None}
        return CausalLMOutputWithPast(loss=loss, logits=logits, hidden_states=states, **returned_cache)

    def _inputs(
        self,
        ids: Tensor | None,
        attention_mask: Tensor | None,
        positions: Tensor | None,
        cache: MythosCache | None,
        use_cache: bool,
        depth: tuple[int, HaltingRule | None],
        with_states: bool,
    ) -> ForwardInputs:
        """Check the inputs of a forward pass; a pass that decodes without a cache gets a new one."""
        if cache is not None and not isinstance(cache, MythosCache):
            raise ValueError(f"{CACHE_NAME}: got a {type(cache).__name__}; allowed: the MythosCache of a forward pass")
        if self.device.type == "meta":
            raise ValueError("the weights are on no device: a mythos model is not offloaded; give device_map={'': 0}")
        ids = check_ids(ids, self.config.context_length)
        mask = token_mask(ids, attention_mask, 0 if cache is None else cache.get_seq_length())
        loops, rule = depth
        decoding = cache is not None or use_cache or rule is not None
        if decoding and self.training and torch.is_grad_enabled():
            raise ValueError(
                "a cache and an exit_threshold carry no gradient: leave out use_cache, cache and exit_threshold in "
                "training, or call model.eval() before"
            )
        if decoding and with_states:
            raise ValueError(
                "output_hidden_states: decoding packs positions, and they may stop at any loop; give use_cache=False "
                "and no exit_threshold"
            )
        documents = document_ids(positions, ids, mask, cache, decoding=decoding)
        if decoding and cache is None:
            cache = MythosCache()
        return ForwardInputs(ids, mask, documents, cache, loops, rule, [] if with_states else None)

    def _targets(
        self, labels: Tensor | None, mask: Tensor | None, kwargs: dict[str, Any]
    ) -> tuple[Tensor | None, Tensor | None]:
        """Labels with -100 where padding would predict them, and targets of all positions; None without labels."""
        if labels is None:
            return None, None
        shifted, ignored = kwargs.get("shift_labels"), kwargs.get("ignore_index")
        labels = labels if mask is None else predicted_labels(labels, mask)
        targets = targets_of(labels)
        if shifted is not None:
            targets = shifted if mask is None else predicted_labels(shifted, mask, shifted=True)
        return labels, targets if ignored is None else targets.masked_fill(targets == ignored, IGNORE_INDEX)

    def _autocast(self) -> AbstractContextManager[Any]:
        """Matmuls in the type of the parameters if it is a 16-bit one, otherwise in the caller's autocast type."""
        dtype = self.model.embedding.weight.dtype
        if dtype not in (torch.float32, torch.bfloat16, torch.float16):
            raise ValueError(
                f"weights: got {dtype}; allowed: float32, bfloat16 or float16, by `model.to(torch.float32)`"
            )
        return nullcontext() if dtype == torch.float32 else torch.autocast(self.device.type, dtype)

    def _depth(self, num_loops: int | None, exit_threshold: float | None) -> tuple[int, HaltingRule | None]:
        """The number of loops and the halting rule of a pass. Raises ValueError for invalid values."""
        loops = self.config.mean_loops if num_loops is None else num_loops
        if not isinstance(loops, int) or isinstance(loops, bool) or loops < 1:
            raise ValueError(f"num_loops: got {loops!r}; allowed: a whole number, at least 1")
        if exit_threshold is None:
            return loops, None
        if not isinstance(exit_threshold, int | float):
            raise ValueError(f"exit_threshold: got {exit_threshold!r}; allowed: a number above 0")
        return loops, halting_rule(self.model, threshold=exit_threshold)

    def _predict(
        self, inputs: ForwardInputs, targets: Tensor | None, custom_loss: bool, logits_to_keep: int | Tensor
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Run all positions for the same number of loops, with gradient and without a cache.

        Returns the logits to keep, all logits (B, S, V) for a custom loss, and otherwise the summed loss in nats.
        """
        hidden = self._hidden(inputs)
        # Ids from vocab_size on only pad the embedding and mean no token.
        head = self.model.head_weight[: self.config.vocab_size]
        loss = None if targets is None or custom_loss else summed_cross_entropy(hidden, head, targets)
        logits = F.linear(kept_positions(hidden, inputs.mask, logits_to_keep), head).float()
        return logits, F.linear(hidden, head).float() if custom_loss else logits, loss

    def _predict_cached(
        self, inputs: ForwardInputs, targets: Tensor | None, custom_loss: bool, logits_to_keep: int | Tensor
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Continue the cache by the ids, without gradient; returns the same as `_predict`."""
        ids, mask, cache = inputs.ids, inputs.mask, inputs.cache
        assert cache is not None
        last = isinstance(logits_to_keep, int) and logits_to_keep == 1 and targets is None
        entries = cache.allocated(self.model, len(ids), inputs.loops)
        extension = self.model.extend(
            ids, entries, mask=mask, loops=inputs.loops, halting=inputs.rule, logits="last" if last else "all"
        )
        cache.advance(ids.shape[1], mask)
        # Ids from vocab_size on only pad the embedding and mean no token.
        logits = extension.logits[..., : self.config.vocab_size]
        logits = logits.unsqueeze(1) if last else logits
        loss = None
        if targets is not None and not custom_loss:
            loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")
        return kept_positions(logits, mask, logits_to_keep), logits, loss

    def _hidden(self, inputs: ForwardInputs) -> Tensor:
        """The head's input, (B, S, D), 0 at padding; fills `inputs.states`."""
        model, ids, mask, states = self.model, inputs.ids, inputs.mask, inputs.states
        order = None
        if states is not None and mask is not None and bool(mask.all()):
            mask = None  # no reordering, so that the loss has a gradient with respect to the returned tensors
        if mask is not None:
            # Move tokens before padding: then causal attention needs no mask, since nothing sees what follows it.
            order = (~mask).byte().argsort(dim=1, stable=True)
            ids = ids.gather(1, order)
        with collect_outputs([model.embedding, *model.prelude, *model.coda], states):
            hidden, _, _ = model.hidden_states(
                ids,
                model.check_loops(inputs.loops, len(ids)),
                inputs.loops,
                document_ids=inputs.documents,
                observe=lambda after: None if states is None else states.append(after.state),
            )
        if states is not None:
            states[-1] = hidden
        if mask is None or order is None:
            return hidden
        back = order.argsort(dim=1).unsqueeze(-1).expand_as(hidden)
        padding = ~mask.unsqueeze(-1)

        def restore(values: Tensor) -> Tensor:
            # Padding was moved behind the tokens and has attended to all of them: its output would leak the future.
            return values.gather(1, back).masked_fill(padding, 0)

        if states is not None:
            states[:] = map(restore, states)
        return restore(hidden)

    def _prepare_generation_config(
        self, generation_config: GenerationConfig | None, *args: Any, **kwargs: Any
    ) -> tuple[GenerationConfig, dict[str, Any]]:
        """Pass our own arguments on to `forward`, whether given to `generate` or set in the configuration."""
        # transformers annotates `self` as a protocol that it never declares to be a base class of a model.
        prepared, model_kwargs = super()._prepare_generation_config(  # type: ignore[misc]
            generation_config, *args, **kwargs
        )
        for name in DEPTH_ARGUMENTS:
            if getattr(prepared, name, None) is not None:
                model_kwargs[name] = getattr(prepared, name)
        self._depth(*(model_kwargs.get(name) for name in DEPTH_ARGUMENTS))
        if getattr(prepared, "assistant_early_exit", None) is not None:
            raise ValueError(
                "assistant_early_exit: a mythos model has no exit after a layer; give a deep copy of it as "
                "assistant_model, with fewer loops in its config.mean_loops"
            )
        return prepared, model_kwargs

    def _prepare_cache_for_generation(
        self, generation_config: GenerationConfig, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> bool:
        """Give `generate` a `MythosCache`; transformers' own caches have no dimension for loops. Returns True."""
        kind = generation_config.cache_implementation
        if kind is not None and not kind.startswith("dynamic"):
            raise ValueError(f"cache_implementation: got {kind!r}; a mythos model has its own cache, leave it out")
        if generation_config.use_cache is not False and model_kwargs.get(CACHE_NAME) is None:
            model_kwargs[CACHE_NAME] = MythosCache()
        mask = model_kwargs.get("attention_mask")
        if mask is not None and not bool(mask.any(1).all()):
            row = int(mask.any(1).byte().argmin())
            raise ValueError(
                f"attention_mask: row {row} holds no token; give every prompt at least one, such as the end of a text"
            )
        return True

    def _prepare_position_ids_for_generation(self, *args: Any, **kwargs: Any) -> None:
        """None: the model counts the tokens of each row itself."""

    def init_continuous_batching(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Not supported: raises ValueError."""
        raise ValueError(
            "continuous batching keeps keys and values in pages that have no place for loops: give generate the "
            "prompts as one padded batch"
        )

    def generate_batch(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Not supported: raises ValueError."""
        self.init_continuous_batching()

    def continuous_batching_context_manager(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Not supported: raises ValueError."""
        self.init_continuous_batching()


@contextmanager
def collect_outputs(modules: Iterable[nn.Module], states: list[Tensor] | None) -> Iterator[None]:
    """Within the context, append the output of each module, (B, S, D), to `states`; do nothing if that is None."""
    if states is None:
        yield
        return

    def append(module: nn.Module, inputs: Any, output: Any) -> None:
        states.append(output[0] if isinstance(output, tuple) else output)

    hooks = [module.register_forward_hook(append) for module in modules]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def retype(tensor: Tensor, value: Tensor) -> None:
    """Set a parameter or buffer to a value of another type, and convert its gradient to that type."""
    gradient = tensor.grad
    tensor.grad = None
    tensor.data = value
    tensor.grad = None if gradient is None else gradient.to(value.dtype)


def float32_tensors(model: RecurrentDepthTransformer) -> dict[str, Tensor]:
    """Tensors that are never rounded to 16 bits, by name: a module's `float32` list, the injection, and buffers."""
    tensors: dict[str, Tensor] = {}
    injection = model.recurrence.injection
    for prefix, module in model.named_modules():
        parameters = dict(module.named_parameters()) if injection is not None and module is injection else {}
        names = {*getattr(module, "float32", ()), *parameters, *dict(module.named_buffers(recurse=False))}
        tensors.update((f"{prefix}.{name}", attrgetter(name)(module)) for name in sorted(names))
    return tensors


AutoModelForCausalLM.register(MythosConfig, MythosForCausalLM)
# Trainer shifts labels for label smoothing only for the classes in this mapping, and `register` does not extend it.
MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[MythosConfig.model_type] = MythosForCausalLM.__name__
