"""The configuration that transformers reads: every field of the model section, under our names and under theirs."""

from typing import Any, ClassVar

from pydantic import ValidationError
from transformers import AutoConfig, PreTrainedConfig

from mythos.model.config import ModelConfig, model_contradictions

DEFAULT_VOCABULARY = 32_000
"""Token ids where none are told: `auto` is the size of a tokenizer, and a configuration alone has none."""

WITHOUT_PLACE: dict[str, tuple[Any, ...]] = {
    "attention_bias": (None, False),
    "mlp_bias": (None, False),
    "attention_dropout": (None, 0),
    "hidden_dropout": (None, 0),
    "resid_pdrop": (None, 0),
    "embd_pdrop": (None, 0),
    "attn_pdrop": (None, 0),
    "sliding_window": (None,),
    "rope_parameters": (None,),
    "rope_scaling": (None,),
    "hidden_act": (None,),
}
"""What other models' configurations set and no field of ours is, and the values that ask for nothing."""


class MythosConfig(PreTrainedConfig):
    """Configuration of a `MythosForCausalLM`.

    Args:
        mean_loops: loops that a forward pass runs unless told otherwise: the mean of training (default: `loops`).
        step: optimizer steps of pretraining.
        versions: what the weights were exported with.
        kwargs: any field of `mythos.model.config.ModelConfig`, or transformers' name for it (see `attribute_map`);
            what else `PreTrainedConfig` takes.

    Raises ValueError for fields that the model section would refuse, telling all of them.
    """

    model_type = "mythos"
    attribute_map: ClassVar[dict[str, str]] = {
        "hidden_size": "dim",
        "intermediate_size": "ffn_dim",
        "num_attention_heads": "n_heads",
        "num_key_value_heads": "n_kv_heads",
        "num_experts": "n_experts",
        "num_experts_per_tok": "experts_per_token",
        "max_position_embeddings": "context_length",
        "tie_word_embeddings": "tie_embeddings",
        "rms_norm_eps": "norm_eps",
    }

    def __init__(
        self,
        *,
        mean_loops: int | None = None,
        step: int = 0,
        versions: dict[str, str] | None = None,
        **kwargs: Any,
    ) -> None:
        given = {self.attribute_map.get(name, name): value for name, value in kwargs.items()}
        defaults = {"vocab_size": DEFAULT_VOCABULARY}
        for name, field in ModelConfig.model_fields.items():
            setattr(self, name, given.pop(name, defaults.get(name, field.default)))
        self.mean_loops = self.loops if mean_loops is None else mean_loops
        self.step = step
        self.versions = versions or {}
        super().__init__(**given)
        self.section()
        # Registers the model with AutoModelForCausalLM. Not before: whoever asks transformers for a tokenizer only
        # would wait for its models, too.
        import mythos.hf.model  # noqa: F401

    @property
    def num_hidden_layers(self) -> int:
        """Blocks with weights of their own; those of the core run once a loop. Set by its three parts.

        Raises ValueError where another number than their sum is set.
        """
        return self.prelude_layers + self.core_layers + self.coda_layers

    @num_hidden_layers.setter
    def num_hidden_layers(self, layers: int) -> None:
        if layers != self.num_hidden_layers:
            raise ValueError(
                f"num_hidden_layers: got {layers}, and prelude_layers, core_layers and coda_layers add up to "
                f"{self.num_hidden_layers}; set those three instead"
            )

    def section(self) -> ModelConfig:
        """The model section that these fields make.

        Raises ValueError for values that it would refuse.
        """
        problems = []
        try:
            section = ModelConfig.model_validate({name: getattr(self, name) for name in ModelConfig.model_fields})
        except ValidationError as error:
            problems = [f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors()]
        else:
            problems = [f"{', '.join(fields)}: {told}" for fields, told in model_contradictions(section)]
            if section.vocab_size == "auto":
                problems.append("vocab_size: got auto; allowed: the number of token ids")
        for name, nothing in WITHOUT_PLACE.items():
            if getattr(self, name, None) not in nothing:
                problems.append(
                    f"{name}: got {getattr(self, name)!r}; a mythos model has no such choice: leave it out; its own "
                    "fields are rope_theta, dense_ffn and the others of the model section"
                )
        if not isinstance(self.mean_loops, int) or self.mean_loops < 1:
            problems.append(f"mean_loops: got {self.mean_loops!r}; allowed: a whole number, at least 1")
        if problems:
            raise ValueError("this is no configuration of a mythos model: " + "; ".join(problems))
        return section


AutoConfig.register(MythosConfig.model_type, MythosConfig)
