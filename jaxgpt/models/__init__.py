"""Model families. Each is a module with the same names (docs/adding_a_model.md); here they are told apart."""

from types import ModuleType

from jaxtyping import Array, Float, Int

from jaxgpt.layers import unembedding
from jaxgpt.models import gpt2, llama, mixtral
from jaxgpt.models.blocks import Context, Params, inputs_of
from jaxgpt.options.config import Model


def family(model: Model) -> ModuleType:
    """The module of this model's family."""
    match model.family:
        case "gpt2":
            return gpt2
        case "llama":
            return llama
        case "mixtral":
            return mixtral


def logits(params: Params, tokens: Int[Array, "B T"], context: Context) -> Float[Array, "B T V"]:
    """Logits over the vocabulary at every place, in float32 at least."""
    module = family(context.model)
    x, _, _ = module.features(params, inputs_of(tokens, context.model), context)
    found = unembedding.logits(module.head(params), x, cap=context.model.logit_soft_cap)
    return found[:, : context.model.vocabulary_size].reshape(*tokens.shape, -1)
