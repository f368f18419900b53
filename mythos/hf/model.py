"""The model as transformers handles models: loading, saving, generating, fine-tuning."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import fields
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
from mythos.hf.labels import predicted_labels, targets_of
from mythos.model import IGNORE_INDEX
from mythos.model.halting import ActHalting, HaltingGate, HaltingRule, Pondering, halting_rule
from mythos.model.layers import random_stream
from mythos.model.loss import summed_cross_entropy
from mythos.model.rdt import RecurrentDepthTransformer, TokenEmbedding
from mythos.model.state import LoopState

CACHE_NAME = "cache" if "cache" in {field.name for field in fields(CausalLMOutputWithPast)} else "past_key_values"
"""What transformers calls a cache: from 5.24 on the former."""

DEPTH_ARGUMENTS = ("num_loops", "exit_threshold")
"""What `generate` and a generation configuration take beside transformers' own arguments."""

NOT_OFFERED = {
    "inputs_embeds": "the decode cache and value embeddings are of token ids; give input_ids",
    "output_attentions": "its attention kernels form no weights; leave it out",
    "output_router_logits": "its routers are balanced by a bias and have no loss of their own; leave it out",
    "cu_seq_lens_q": "documents of a packed row are told by position_ids that start again at 0",
    "seq_idx": "documents of a packed row are told by position_ids that start again at 0",
}
"""Arguments of transformers' models that would change what is computed or returned, and why there are none here."""

WITHOUT_EFFECT = frozenset({"tokenizer", "assistant_tokenizer", "skip_logits", "is_causal"})
"""What transformers hands on to every model, and no model of its own reads (`is_causal`: but for False)."""

logger = logging.get_logger(__name__)


class MythosForCausalLM(PreTrainedModel, GenerationMixin):
    """A `RecurrentDepthTransformer` in transformers' clothes.

    Tensors have the names they have in checkpoints. Matrix products are in the type of the parameters; what must not be
    rounded to 16 bits stays float32 whatever `dtype` is asked for. The loop runs on one device: `device_map` places the
    model as a whole.
    """

    config_class = MythosConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    accepts_loss_kwargs = True
    _no_split_modules = ("RecurrentDepthTransformer",)
    _supports_sdpa = True

    def __init__(self, config: MythosConfig) -> None:
        super().__init__(config)
        self.model = RecurrentDepthTransformer(config.section())
        whole = float32_tensors(self.model)
        self._keep_in_fp32_modules_strict = {f"model.{name}" for name in whole}  # where weights are loaded
        for tensor in whole.values():
            tensor.data = tensor.data.float()  # where they are made in another type
        if isinstance(self.model.halting, HaltingGate):
            # A gate is not trained here, and DDP would wait for its gradients.
            gate = self.model.halting.named_parameters(prefix="model.halting")
            self._ddp_params_and_buffers_to_ignore = [name for name, _ in gate]
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """The embedding; it is the head too where they are tied."""
        return self.model.embedding

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the embedding by another of its kind and size.

        Raises ValueError for any other module: ours scales its rows.
        """
        own = self.model.embedding
        if not isinstance(value, TokenEmbedding) or value.weight.shape != own.weight.shape:
            raise ValueError(
                f"the embedding of a mythos model cannot become a {type(value).__name__}: it is a TokenEmbedding of "
                f"shape {tuple(own.weight.shape)}; change its weight instead"
            )
        self.model.embedding = value

    def get_output_embeddings(self) -> nn.Module | None:
        """The head, None where it is the embedding."""
        return self.model.head

    def resize_token_embeddings(self, *_: Any, **__: Any) -> nn.Module:
        """Not supported: raises ValueError."""
        raise ValueError(
            f"the vocabulary of a mythos model cannot be resized: it has {self.config.vocab_size} token ids; use a "
            "tokenizer that needs no more"
        )

    @property
    def gradient_checkpointing(self) -> bool:
        """Whether every loop is computed again in the backward pass, instead of kept; set by transformers."""
        return self.model.recurrence.checkpointing == "loop"

    @gradient_checkpointing.setter
    def gradient_checkpointing(self, enable: bool) -> None:
        self.model.recurrence.checkpointing = "loop" if enable else "none"

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Fill what no file gave values to, seeded by torch's own generator."""
        initializers = getattr(module, "initializers", {})
        for name, tensor in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
            if not getattr(tensor, "_is_hf_initialized", False):
                value = torch.zeros(tensor.shape, dtype=torch.float32, device="cpu")
                if name in initializers:
                    seed = int(torch.randint(2**62, (), device="cpu"))
                    initializers[name](value, random_stream(seed, name))
                tensor.copy_(value)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "MythosForCausalLM":
        """Move or convert all tensors, as `to`, `half` and `double` ask for it.

        What must be float32 stays so in 16 bits. In float64 everything does, with a warning: states are float32.
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
        """Logits of the next token at every position, and the loss where labels are given.

        Positions count the tokens of each row: padding, wherever in a row it is, changes nothing for the others.

        Args:
            input_ids: (B, S) int64.
            attention_mask: (B, S), 0 at padding; with a cache (B, columns of the cache + S).
            position_ids: (B, S) or (1, S) int64; not needed. Without mask and cache a row in which they do not count
                on by one holds several documents, each of which sees itself alone. Else they must be the positions
                that tokens have anyway.
            cache: what earlier passes returned; these ids continue it.
            past_key_values: older name of `cache`.
            token_type_ids: without effect; some tokenizers return them, and this model has no segments.
            labels: (B, S) int64, the ids themselves, -100 where there is none; shifted here. What padding would predict
                is left out.
            use_cache: also return a cache (default: only where one is given). It carries no gradient.
            num_loops: passes of the core for every position (default `config.mean_loops`).
            exit_threshold: stop positions earlier, by the model's halting rule at this threshold (default: none does).
            output_hidden_states: also return what passes through the model: the embedding, the output of each prelude
                block, the state after each loop, the output of each coda block; in place of the last of them what the
                head reads. Not with a cache or a threshold.
            logits_to_keep: logits of the last so many positions only, or of these positions; 0 = all. 1 means the last
                token of each row.
            num_items_in_batch: what the summed loss is divided by (default: the labels that count).
            kwargs: `shift_labels` (B, S), labels that are shifted already; `ignore_index`, a label beside -100 that
                does not count. Others are ignored with a warning, as transformers' models ignore them.

        Returns loss (float32 scalar, nats, of the logits, by `loss_function` where one was set), logits (B, S,
        config.vocab_size) float32, 0 at padding, and hidden states (B, S, D) float32 where asked for.

        Raises ValueError for ids longer than the context, num_loops below 1, a threshold that the rule does not know or
        a model without a rule, a mask of another shape, positions that tokens do not have, a cache of another model or
        another kind, a cache or threshold in training or with hidden states, what `NOT_OFFERED` names, and for weights
        that are on no device or of a type that the model does not compute in.
        """
        self._check_arguments(kwargs)
        if input_ids is None or input_ids.ndim != 2 or input_ids.shape[1] == 0:
            given = "none" if input_ids is None else f"ids of shape {tuple(input_ids.shape)}"
            raise ValueError(f"input_ids: got {given}; allowed: (rows, tokens), at least one token")
        cache = past_key_values if cache is None else cache
        if cache is not None and not isinstance(cache, MythosCache):
            raise ValueError(f"{CACHE_NAME}: got a {type(cache).__name__}; allowed: the MythosCache of a forward pass")
        if self.device.type == "meta":
            raise ValueError("the weights are on no device: a mythos model is not offloaded; give device_map={'': 0}")
        use_cache = cache is not None if use_cache is None else use_cache
        loops, rule = self._depth(num_loops, exit_threshold)
        mask = self._mask(input_ids, attention_mask, 0 if cache is None else cache.get_seq_length())
        decoding = cache is not None or use_cache or rule is not None
        if decoding and self.training and torch.is_grad_enabled():
            raise ValueError(
                "a cache and an exit_threshold carry no gradient: leave out use_cache, cache and exit_threshold in "
                "training, or call model.eval() before"
            )
        states: list[Tensor] | None = None
        if self.config.output_hidden_states if output_hidden_states is None else output_hidden_states:
            if decoding:
                raise ValueError(
                    "output_hidden_states: decoding packs positions, and they may stop at any loop; give "
                    "use_cache=False and no exit_threshold"
                )
            states = []
        documents = self._documents(position_ids, input_ids, mask, cache, decoding=decoding)
        labels, targets = self._targets(labels, mask, kwargs)
        custom = None if self.loss_function is ForCausalLMLoss else self.loss_function
        loss = None
        with self._autocast():
            if decoding:
                cache = MythosCache() if cache is None else cache
                last = logits_to_keep == 1 if isinstance(logits_to_keep, int) else False
                logits = self._extend(input_ids, mask, cache, loops, rule, last=last and targets is None)
                whole = logits
                if targets is not None and custom is None:
                    loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")
                logits = kept(logits, mask, logits_to_keep)
            else:
                hidden = self._hidden(input_ids, mask, documents, loops, states)
                # Rows that only pad the embedding mean no token.
                head = self.model.head_weight[: self.config.vocab_size]
                if targets is not None and custom is None:
                    loss = summed_cross_entropy(hidden, head, targets)
                logits = F.linear(kept(hidden, mask, logits_to_keep), head).float()
                whole = F.linear(hidden, head).float() if custom is not None and targets is not None else logits
        if targets is not None and custom is not None:
            if num_items_in_batch is not None:
                kwargs["num_items_in_batch"] = num_items_in_batch
            loss = custom(logits=whole, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        elif loss is not None and targets is not None:
            count = (targets != IGNORE_INDEX).sum() if num_items_in_batch is None else num_items_in_batch
            loss = loss / (count.to(loss.device) if isinstance(count, Tensor) else count)
        returned = {CACHE_NAME: cache if use_cache else None}
        returned["hidden_states"] = None if states is None else tuple(states)
        return CausalLMOutputWithPast(loss=loss, logits=logits, **returned)

    def _check_arguments(self, kwargs: dict[str, Any]) -> None:
        """Raise ValueError for what a caller would miss, and warn of what is ignored."""
        for name, why in NOT_OFFERED.items():
            asked = kwargs.get(name)
            if asked is None and name.startswith("output_"):
                asked = getattr(self.config, name, None)
            if asked is not None and asked is not False:
                raise ValueError(f"{name}: a mythos model does not offer it: {why}")
        if kwargs.get("is_causal") is False:
            raise ValueError("is_causal: got False; a mythos model is causal: leave it out")
        known = {"shift_labels", "ignore_index"} | WITHOUT_EFFECT
        ignored = sorted(name for name, value in kwargs.items() if value is not None and name not in known)
        for name in ignored:
            if name not in NOT_OFFERED:
                logger.warning_once(f"{name}: ignored, {type(self).__name__}.forward has no such argument")

    def _targets(
        self, labels: Tensor | None, mask: Tensor | None, kwargs: dict[str, Any]
    ) -> tuple[Tensor | None, Tensor | None]:
        """Labels without those that nothing predicts, and the target of every position; None without labels."""
        if labels is None:
            return None, None
        shifted, other = kwargs.get("shift_labels"), kwargs.get("ignore_index")
        labels = labels if mask is None else predicted_labels(labels, mask)
        targets = targets_of(labels)
        if shifted is not None:
            targets = shifted if mask is None else predicted_labels(shifted, mask, shifted=True)
        return labels, targets if other is None else targets.masked_fill(targets == other, IGNORE_INDEX)

    def _documents(
        self, positions: Tensor | None, ids: Tensor, mask: Tensor | None, cache: MythosCache | None, *, decoding: bool
    ) -> Tensor | None:
        """Which document each id is of, (B, S) int64, as positions tell it; None where each row holds one.

        Raises ValueError for positions that tokens do not have.
        """
        if positions is None:
            return None
        if positions.ndim != 2 or positions.shape[1] != ids.shape[1] or positions.shape[0] not in (1, len(ids)):
            raise ValueError(f"position_ids: got shape {tuple(positions.shape)}; allowed: {tuple(ids.shape)}")
        tokens = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask
        counted = tokens.cumsum(1) - 1
        offset = positions - counted  # constant over the tokens of a row that holds one document
        if decoding:
            lengths = [0] * len(ids) if cache is None or cache.decode is None else cache.decode.lengths
            start = torch.tensor(lengths, device=ids.device).unsqueeze(1)
        else:
            if mask is None:
                documents = F.pad((offset.diff(dim=1) != 0).cumsum(1), (1, 0)).expand(len(ids), -1)
                return documents if bool(documents.any()) else None
            start = offset.gather(1, tokens.byte().argmax(1, keepdim=True).expand(len(offset), 1))
        if bool(((offset != start) & tokens).any()):
            raise ValueError(
                "position_ids: a mythos model counts the tokens of each row, from 0 where it caches them, and these "
                "are other positions; leave position_ids out, or leave the attention_mask out of rows that hold "
                "several documents"
            )
        return None

    def _autocast(self) -> AbstractContextManager[Any]:
        """Products in the type of the parameters if that is a short one, else in what the caller chose."""
        dtype = self.model.embedding.weight.dtype
        if dtype not in (torch.float32, torch.bfloat16, torch.float16):
            raise ValueError(
                f"weights: got {dtype}; allowed: float32, bfloat16 or float16, by `model.to(torch.float32)`"
            )
        return nullcontext() if dtype == torch.float32 else torch.autocast(self.device.type, dtype)

    def _depth(self, num_loops: int | None, exit_threshold: float | None) -> tuple[int, HaltingRule | None]:
        loops = self.config.mean_loops if num_loops is None else num_loops
        if not isinstance(loops, int) or isinstance(loops, bool) or loops < 1:
            raise ValueError(f"num_loops: got {loops!r}; allowed: a whole number, at least 1")
        if exit_threshold is None:
            return loops, None
        if not isinstance(exit_threshold, int | float):
            raise ValueError(f"exit_threshold: got {exit_threshold!r}; allowed: a number above 0")
        return loops, halting_rule(self.model, threshold=exit_threshold)

    def _mask(self, ids: Tensor, mask: Tensor | None, past: int) -> Tensor | None:
        """Which of the ids are tokens, (B, S) bool; None where all are."""
        rows, length = ids.shape
        context = self.config.context_length
        if length > context:
            raise ValueError(
                f"an input of {length} tokens: the model's context is {context} (context_length); shorten it, in a "
                f"tokenizer by truncation=True, max_length={context}"
            )
        if mask is None:
            return None
        if mask.shape != (rows, past + length):
            raise ValueError(
                f"attention_mask: got shape {tuple(mask.shape)}; allowed: {(rows, past + length)}, a column for every "
                + (f"id, the {past} of the cache included" if past else "id")
            )
        return mask[:, past:].bool()

    def _hidden(
        self, ids: Tensor, mask: Tensor | None, documents: Tensor | None, loops: int, states: list[Tensor] | None
    ) -> Tensor:
        """What the head reads, (B, S, D), 0 at padding, all positions run alike and with gradient.

        Appends to `states` what `output_hidden_states` asks for.
        """
        model, order = self.model, None
        if states is not None and mask is not None and bool(mask.all()):
            mask = None  # nothing is moved, and the loss has a gradient of the very tensors that are returned
        if mask is not None:
            # Tokens first: what comes after them changes nothing, so that causal attention needs no mask.
            order = (~mask).byte().argsort(dim=1, stable=True)
            ids = ids.gather(1, order)
        context = model.context(ids, documents)
        with outputs_of([model.embedding, *model.prelude], states):
            e = model.encode(ids, context)
        state = e.new_zeros(e.shape, dtype=torch.float32)
        pondering = Pondering(model.halting) if isinstance(model.halting, ActHalting) else None

        def observe(after: LoopState) -> None:
            if pondering is not None:
                pondering.observe(after)
            if states is not None:
                states.append(after.state)

        state = model.recurrence(e, state, model.check_loops(loops, len(ids)), loops, context, observe).state
        with outputs_of(model.coda, states):
            hidden = model.decode(state if pondering is None else pondering.result(state), context)
        if states is not None:
            states[-1] = hidden
        if mask is None or order is None:
            return hidden
        back = order.argsort(dim=1).unsqueeze(-1).expand_as(hidden)

        def in_place(values: Tensor) -> Tensor:
            # Padding was moved behind the tokens and has seen them all: a prediction of it would know what comes.
            return values.gather(1, back).masked_fill(~mask.unsqueeze(-1), 0)

        if states is not None:
            states[:] = map(in_place, states)
        return in_place(hidden)

    def _extend(
        self, ids: Tensor, mask: Tensor | None, cache: MythosCache, loops: int, rule: HaltingRule | None, *, last: bool
    ) -> Tensor:
        """Logits (B, S, V) of ids that continue a cache; with `last` those of each row's last token, (B, 1, V).

        V is config.vocab_size: rows that only pad the embedding mean no token.
        """
        entries = cache.of(self.model, len(ids), loops)
        which = "last" if last else "all"
        found = self.model.extend(ids, entries, mask=mask, loops=loops, halting=rule, logits=which).logits
        cache.advance(ids.shape[1], mask)
        found = found[..., : self.config.vocab_size]
        return found.unsqueeze(1) if last else found

    def _prepare_generation_config(
        self, generation_config: GenerationConfig | None, *args: Any, **kwargs: Any
    ) -> tuple[GenerationConfig, dict[str, Any]]:
        """Hand our own arguments on to `forward`, wherever they were given."""
        prepared, model_kwargs = super()._prepare_generation_config(generation_config, *args, **kwargs)
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
    ) -> None:
        """Give `generate` a cache of ours; transformers' own have no place for loops."""
        kind = generation_config.cache_implementation
        if kind is not None and not kind.startswith("dynamic"):
            raise ValueError(f"cache_implementation: got {kind!r}; a mythos model has a cache of its own, leave it out")
        if generation_config.use_cache is not False and model_kwargs.get(CACHE_NAME) is None:
            model_kwargs[CACHE_NAME] = MythosCache()
        mask = model_kwargs.get("attention_mask")
        if mask is not None and not bool(mask.any(1).all()):
            row = int(mask.any(1).byte().argmin())
            raise ValueError(
                f"attention_mask: row {row} holds no token; give every prompt at least one, such as the end of a text"
            )

    def _prepare_position_ids_for_generation(self, *args: Any, **kwargs: Any) -> None:
        """None: positions count the tokens of a row, and need not be told."""

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
def outputs_of(modules: Iterable[nn.Module], states: list[Tensor] | None) -> Iterator[None]:
    """Append what modules return while the context lasts, (B, S, D) each, to `states`, if that is a list."""

    def append(module: nn.Module, inputs: Any, output: Any) -> None:
        states.append(output[0] if isinstance(output, tuple) else output)

    hooks = [] if states is None else [module.register_forward_hook(append) for module in modules]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def kept(values: Tensor, mask: Tensor | None, which: int | Tensor) -> Tensor:
    """(B, S, X) at the chosen positions: see `logits_to_keep` of `MythosForCausalLM.forward`."""
    if isinstance(which, Tensor):
        return values[:, which]
    if which == 1 and mask is not None and values.shape[1] > 1:
        column = (mask * torch.arange(1, mask.shape[1] + 1, device=mask.device)).argmax(1)
        return values.gather(1, column.view(-1, 1, 1).expand(-1, 1, values.shape[2]))
    return values[:, -which:]  # of 0: all


def retype(tensor: Tensor, value: Tensor) -> None:
    """Give a parameter or buffer a value of another type, and its gradient that type."""
    gradient = tensor.grad
    tensor.grad = None
    tensor.data = value
    tensor.grad = None if gradient is None else gradient.to(value.dtype)


def float32_tensors(model: RecurrentDepthTransformer) -> dict[str, Tensor]:
    """What is never rounded to 16 bits, by name: what modules declare as `float32`, the injection, and buffers."""
    found = {}
    for prefix, module in model.named_modules():
        whole = dict(module.named_parameters()) if module is model.recurrence.injection else {}
        declared = {*getattr(module, "float32", ()), *whole, *dict(module.named_buffers(recurse=False))}
        found.update((f"{prefix}.{name}", attrgetter(name)(module)) for name in sorted(declared))
    return found


AutoModelForCausalLM.register(MythosConfig, MythosForCausalLM)
# Trainer shifts the labels of label smoothing for classes that stand here, and `register` does not enter ours.
MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[MythosConfig.model_type] = MythosForCausalLM.__name__
