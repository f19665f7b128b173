"""What a family of published models is: how its config.json reads, what its tensors are called, what is harmless."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from mlm.interop.rules import ConversionError, Rule
from mlm.models.config import ModelConfig, StackConfig
from mlm.models.specs import AttentionSpec, FFNSpec, LayerSpec
from mlm.registry import nearest

# Keys of any config.json that say nothing about the mathematics of a trained model, or whose values here are fixed by
# its tensors: bookkeeping, training, generation, labels of other heads.
HARMLESS = frozenset(
    """
    _name_or_path architectures model_type transformers_version dtype torch_dtype use_cache gradient_checkpointing
    is_encoder_decoder is_decoder add_cross_attention cross_attention_hidden_size
    output_attentions output_hidden_states output_past return_dict return_dict_in_generate output_scores
    attn_implementation _attn_implementation _attn_implementation_autoset chunk_size_feed_forward torchscript
    initializer_factor initializer_range init_std n_positions classifier_dropout classifier_dropout_rate classif_dropout
    dropout dropout_rate attention_dropout activation_dropout encoder_layerdrop decoder_layerdrop hidden_dropout_prob
    attention_probs_dropout_prob num_hidden_layers layerdrop
    pad_token_id bos_token_id eos_token_id decoder_start_token_id sep_token_id forced_bos_token_id forced_eos_token_id
    max_length min_length num_beams num_beam_groups diversity_penalty early_stopping length_penalty no_repeat_ngram_size
    encoder_no_repeat_ngram_size repetition_penalty do_sample temperature top_k top_p typical_p bad_words_ids
    num_return_sequences exponential_decay_length_penalty suppress_tokens begin_suppress_tokens remove_invalid_values
    prefix task_specific_params problem_type finetuning_task id2label label2id num_labels tokenizer_class
    tf_legacy_loss use_bfloat16 auto_map
    """.split()  # noqa: SIM905
)


class Keys:
    """A config.json that knows which of its keys have been read, so that none passes unread."""

    def __init__(self, content: Mapping[str, Any], where: str):
        self._content, self.where = content, where
        self._read: set[str] = set()

    def __contains__(self, name: str) -> bool:
        return self._content.get(name) is not None

    def get(self, name: str, default: Any = None) -> Any:
        """The value; the default for one that is missing or null."""
        self._read.add(name)
        value = self._content.get(name)
        return default if value is None else value

    def need(self, name: str) -> Any:
        value = self.get(name)
        if value is None:
            raise ConversionError(
                f"{self.where} has no {name!r}, which this family needs; {nearest(name, self._content)}"
            )
        return value

    def expect(self, name: str, *values: Any) -> None:
        """Raises ConversionError when the key is there and says anything else: that would be another mathematics."""
        found = self.get(name, values[0])
        if found not in values:
            shown = " or ".join(repr(value) for value in values)
            raise ConversionError(f"{self.where}: {name}={found!r}, but only {shown} can be converted")

    def part(self, name: str) -> "Keys":
        """A nested object, e.g. the config of one stack."""
        value = self.need(name)
        if not isinstance(value, dict):
            raise ConversionError(f"{self.where}: {name} is {value!r}, not an object")
        return Keys(value, f"{self.where}: {name}")

    def finish(self, harmless: Sequence[str] = ()) -> None:
        """Raises ConversionError for keys that nobody read and nobody declared harmless."""
        known = self._read | HARMLESS | set(harmless)
        unread = sorted(name for name, value in self._content.items() if name not in known and value is not None)
        if unread:
            shown = ", ".join(f"{name}={self._content[name]!r}" for name in unread[:8])
            raise ConversionError(
                f"{self.where} has {len(unread)} keys that may change the mathematics and that this converter does not "
                f"know: {shown}. If they are harmless, add them to the family's list in mlm/interop"
            )


@dataclass(frozen=True)
class Ids:
    """How token ids of the published model become ours: 0 padding, 1 end of sequence, 2 unknown.

    first: the published ids that ours 0, 1, 2, … stand for; from len(first) on they are the same.
    """

    first: tuple[int, ...] = ()

    def ours(self, theirs: int) -> int:
        return self.first.index(theirs) if theirs in self.first else theirs

    def theirs(self, ours: int) -> int:
        return self.first[ours] if ours < len(self.first) else ours


@dataclass(frozen=True, kw_only=True)
class Family:
    """Everything about one `model_type`.

    read: (config.json, names of the tensors) -> ModelConfig. write: its inverse for configs of this family; what it
    cannot express shows when the result is read back. rules: names and axes of the parameters of a config.
    copies: name of a tensor that repeats another -> that other; they must be equal. zeros: tensors that must be zero.
    harmless: keys of config.json beside HARMLESS. ids: how token ids change.
    ignored: expressions of tensors without parameters of ours (buffers that the config determines).
    """

    name: str
    read: Callable[[Keys, frozenset[str]], ModelConfig]
    write: Callable[[ModelConfig], dict[str, Any]]
    rules: Callable[[ModelConfig], Sequence[Rule]]
    copies: Mapping[str, str] = field(default_factory=dict)
    zeros: tuple[str, ...] = ()
    harmless: tuple[str, ...] = ()
    ignored: tuple[str, ...] = ()
    ids: Ids = Ids()


def both(config: ModelConfig) -> tuple[StackConfig, StackConfig]:
    """(encoder, decoder). Raises ConversionError when one is missing."""
    if config.encoder is None or config.decoder is None:
        raise ConversionError("it has an encoder and a decoder")
    return config.encoder, config.decoder


def attention(layer: LayerSpec) -> AttentionSpec:
    """The first attention of a layer. Raises ConversionError when it has none."""
    found = [spec for spec in layer.sublayers if isinstance(spec, AttentionSpec)]
    if not found:
        raise ConversionError("every layer of it has attention")
    return found[0]


def feed_forward(layer: LayerSpec) -> FFNSpec:
    """The feed-forward sublayer of a layer. Raises ConversionError when it has none."""
    found = [spec for spec in layer.sublayers if isinstance(spec, FFNSpec)]
    if not found:
        raise ConversionError("every layer of it has a feed-forward sublayer")
    return found[0]
