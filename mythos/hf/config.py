"""The configuration that transformers reads: every field of the model section, under our names and transformers'."""

from os import PathLike
from pathlib import Path
from typing import Any, ClassVar

from pydantic import ValidationError
from transformers import AutoConfig, PreTrainedConfig

from mythos.hf.auto_classes import register_model
from mythos.model.config import ModelConfig, model_contradictions

DEFAULT_VOCABULARY = 32_000
"""Default number of token ids. The model section's default, `auto`, needs a tokenizer, which a configuration lacks."""

DROPOUTS = ("attention_dropout", "hidden_dropout", "resid_pdrop", "embd_pdrop", "attn_pdrop")
UNSUPPORTED_FIELDS: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(("attention_bias", "mlp_bias"), (None, False)),
    **dict.fromkeys(DROPOUTS, (None, 0)),
    **dict.fromkeys(("sliding_window", "rope_parameters", "rope_scaling", "hidden_act"), (None,)),
}
"""Fields of other models' configurations that ours does not have, and the values that switch the feature off."""


REMOTE_MODULE = "modeling_mythos"
REMOTE_CODE = '''"""Import mythos for programs that do not, such as lm_eval; they pass trust_remote_code=True."""

try:
    from mythos.hf import MythosConfig, MythosForCausalLM
except ImportError as error:
    raise ImportError("this model needs the package mythos: run `pip install mythos-rdt`") from error
'''
"""The module that is saved beside the configuration. transformers looks up names of packages in `import` statements
outside of `try`, and would advise to install a package called mythos, which is not this one."""


class MythosConfig(PreTrainedConfig):
    """Configuration of a `MythosForCausalLM`.

    Args:
        mean_loops: default number of loops of a forward pass: the mean of training (default: `loops`).
        sequence_length: tokens of a sequence in pretraining; None if it is not known.
        mask_documents: whether a token saw those of its own document only in pretraining. The model does not mask them
            by itself: give each document a row, or `position_ids` that start again at 0.
        step: optimizer steps of pretraining.
        versions: package versions that the weights were exported with.
        kwargs: any field of `mythos.model.config.ModelConfig`, under its name or transformers' (see `attribute_map`);
            also any other argument of `PreTrainedConfig`.

    Raises ValueError for fields that the model section would refuse, listing all of them.
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
        sequence_length: int | None = None,
        mask_documents: bool = False,
        step: int = 0,
        versions: dict[str, str] | None = None,
        **kwargs: Any,
    ) -> None:
        values = {self.attribute_map.get(name, name): value for name, value in kwargs.items()}
        defaults = {"vocab_size": DEFAULT_VOCABULARY}
        for name, field in ModelConfig.model_fields.items():
            setattr(self, name, values.pop(name, defaults.get(name, field.default)))
        self.mean_loops = self.loops if mean_loops is None else mean_loops
        self.sequence_length = sequence_length
        self.mask_documents = mask_documents
        self.step = step
        self.versions = versions or {}
        super().__init__(**values)
        self.section()
        # Not at import: a program that only loads a tokenizer would then import all of transformers' model code.
        register_model()

    def save_pretrained(self, save_directory: str | PathLike, push_to_hub: bool = False, **kwargs: Any) -> None:
        """Save as transformers does, with the module that loads the model for clients with `trust_remote_code=True`.

        `model.save_pretrained` and `Trainer` call this too. Raises FileExistsError if the directory is a file.
        """
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{REMOTE_MODULE}.py").write_text(REMOTE_CODE, encoding="utf-8")
        names = {"AutoConfig": "MythosConfig", "AutoModelForCausalLM": "MythosForCausalLM"}
        self.auto_map = {auto_class: f"{REMOTE_MODULE}.{name}" for auto_class, name in names.items()}
        super().save_pretrained(save_directory, push_to_hub=push_to_hub, **kwargs)

    @classmethod
    def register_for_auto_class(cls, auto_class: str = "AutoConfig") -> None:
        """Do nothing. transformers calls this for remote code, and would save a copy of this file with every model."""

    @property
    def num_hidden_layers(self) -> int:
        """Blocks with their own weights (core blocks run once per loop): prelude, core and coda layers together.

        Setting it raises ValueError unless the number is that sum.
        """
        return self.prelude_layers + self.core_layers + self.coda_layers

    @num_hidden_layers.setter
    def num_hidden_layers(self, layers: int) -> None:
        if layers != self.num_hidden_layers:
            raise ValueError(
                f"num_hidden_layers: got {layers}, but prelude_layers, core_layers and coda_layers add up to "
                f"{self.num_hidden_layers}; set those three instead"
            )

    def section(self) -> ModelConfig:
        """The model section with these fields.

        Raises ValueError for values that the section refuses, listing all of them.
        """
        problems = []
        try:
            section = ModelConfig.model_validate({name: getattr(self, name) for name in ModelConfig.model_fields})
        except ValidationError as error:
            problems = [f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors()]
        else:
            problems = [f"{', '.join(fields)}: {message}" for fields, message in model_contradictions(section)]
            if section.vocab_size == "auto":
                problems.append("vocab_size: got auto; allowed: the number of token ids")
        for name, neutral_values in UNSUPPORTED_FIELDS.items():
            if getattr(self, name, None) not in neutral_values:
                problems.append(
                    f"{name}: got {getattr(self, name)!r}; a mythos model has no such option: leave it out. Its own "
                    "fields are those of the model section, such as rope_theta and dense_ffn"
                )
        if not isinstance(self.mean_loops, int) or self.mean_loops < 1:
            problems.append(f"mean_loops: got {self.mean_loops!r}; allowed: a whole number, at least 1")
        length, context = self.sequence_length, self.context_length
        if length is not None and not (isinstance(length, int) and isinstance(context, int) and 1 <= length <= context):
            problems.append(
                f"sequence_length: got {length!r}; allowed: a whole number from 1 to context_length, or None"
            )
        if problems:
            raise ValueError("this is no valid configuration of a mythos model: " + "; ".join(problems))
        return section


AutoConfig.register(MythosConfig.model_type, MythosConfig)
