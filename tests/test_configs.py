"""Every file in configs/: it reads, it checks, and the models it names have the sizes that they are known by."""

import jax
import pytest

from jaxgpt.commands import configuration
from jaxgpt.data import corpora, sources, tokenizers
from jaxgpt.models import family
from jaxgpt.options import checks, settings

# GPT-2's as llm.c and Hugging Face count them; GPT-3's counted once from the tensors of table 2.1's shapes, by hand.
PARAMETERS = {
    "gpt2_124m": 124_439_808,
    "gpt2_124m_fineweb": 124_439_808,
    "gpt2_350m": 354_823_168,
    "gpt2_350m_fineweb": 354_823_168,
    "gpt2_774m": 774_030_080,
    "gpt2_774m_fineweb": 774_030_080,
    "gpt2_1558m": 1_557_611_200,
    "gpt2_1558m_fineweb_edu": 1_557_611_200,
    "gpt3_125m": 125_226_240,
    "gpt3_125m_fineweb": 125_226_240,
    "gpt3_350m": 355_871_744,
    "gpt3_760m": 760_300_032,
    "gpt3_1300m": 1_315_723_264,
}
# As transformers counts them, which a test below asks.
RELATIVES = {
    "llama3_8b": 8_030_261_248,
    "llama3_1b": 1_235_814_400,
    "mistral_7b": 7_241_732_096,
    "qwen3_0.6b": 596_049_920,
    "smollm2_135m": 134_515_008,
}


@pytest.fixture(scope="module")
def resolved():
    """The configuration of a name, with the sizes that follow from its tokenizer."""

    def read(name):
        config = settings.read(settings.find_config(name))
        if config.model.vocabulary_size:  # Llama 3's tokenizer isn't here, and others' come with token files
            return configuration.resolve(config, tokenizers.make("bytes", ""))
        text = "abc" if config.data.tokenizer == "characters" else ""
        return configuration.resolve(config, tokenizers.make(config.data.tokenizer, text))

    return read


@pytest.mark.parametrize("name", settings.config_names())
def test_every_config_is_one_that_a_run_could_use(resolved, name):
    checks.check(settings.read(settings.find_config(name)))
    checks.check(resolved(name))


@pytest.mark.parametrize("name", settings.config_names())
def test_every_config_trains_on_a_text_that_there_is(name):
    """The text has a name: a path would be one on somebody's machine."""
    assert settings.read(settings.find_config(name)).data.text in {*corpora.NAMES, *sources.DATA_SETS}


@pytest.mark.parametrize("name", [*PARAMETERS, *RELATIVES])
def test_the_named_sizes(resolved, name):
    """Parameters are counted from the shapes of the trained tensors, without their padding, and by the formula."""
    model, count = resolved(name).model, (PARAMETERS | RELATIVES)[name]
    assert name in RELATIVES or model.vocabulary_size == 50_257
    made = family(model)
    shapes = jax.eval_shape(lambda: made.init(model, jax.random.key(0)))
    stored = sum(leaf.size for leaf in jax.tree.leaves(shapes))
    tables = 1 if name in PARAMETERS or model.tied else 2
    padding = tables * (shapes.embedding.token.shape[0] - model.vocabulary_size) * model.width
    assert stored - padding == count
    assert made.parameter_count(model) == count
    assert made.parameter_count(model, padded=True) == stored


@pytest.mark.parametrize("name", RELATIVES)
def test_the_shapes_are_those_of_transformers(resolved, name):
    """The numbers of all tensors of the model that transformers makes of the same sizes, without making them."""
    torch = pytest.importorskip("torch", reason="the model of transformers is the oracle")
    transformers = pytest.importorskip("transformers", reason="its models are the oracle")
    model = resolved(name).model
    kinds = {"mistral_7b": transformers.MistralConfig, "qwen3_0.6b": transformers.Qwen3Config}
    theirs = kinds.get(name, transformers.LlamaConfig)(
        num_hidden_layers=model.layers,
        num_attention_heads=model.heads,
        num_key_value_heads=model.kv_heads,
        head_dim=model.width_per_head,
        hidden_size=model.width,
        intermediate_size=model.feed_forward,
        vocab_size=model.vocabulary_size,
        tie_word_embeddings=model.tied,
    )
    with torch.device("meta"):
        made = transformers.AutoModelForCausalLM.from_config(theirs)
    assert sum(tensor.numel() for tensor in made.parameters()) == RELATIVES[name]


def test_the_gpt3_sizes_follow_from_the_papers_shapes(resolved):
    """12 L C² of weights and 13 L C of biases and norms, the final norm, and the two embeddings: table 2.1 by hand."""
    table = {  # name: layers, width, heads
        "gpt3_125m": (12, 768, 12),
        "gpt3_350m": (24, 1024, 16),
        "gpt3_760m": (24, 1536, 16),
        "gpt3_1300m": (24, 2048, 16),
    }
    for name, (layers, width, heads) in table.items():
        model = resolved(name).model
        assert (model.layers, model.width, model.heads, model.context) == (layers, width, heads, 2048)
        assert PARAMETERS[name] == 12 * layers * width**2 + (13 * layers + 2 + 50_257 + 2048) * width


def test_the_recipe_is_the_same_model_as_the_config_that_runs_anywhere(resolved):
    small, recipe = resolved("gpt2_124m"), resolved("gpt2_124m_fineweb")
    assert small.model == recipe.model
    assert "gpt2_124m_fineweb" in small.run.note
    training = recipe.training
    assert training.batch_size * training.micro_batches * training.sequence_length == 524_288


# llm.c's scripts: tokens of a step, learning rate, its last share, steps.
RECIPES = {
    "gpt2_124m_fineweb": (524_288, 6e-4, 0.0, 18_865),
    "gpt2_350m_fineweb": (524_288, 3e-4, 0.0, 60_000),
    "gpt2_774m_fineweb": (524_288, 2.5e-4, 0.0, 286_102),
    "gpt2_1558m_fineweb_edu": (1_048_576, 6e-4, 0.1, 32_000),
    "gpt3_125m_fineweb": (524_288, 6e-4, 0.1, 572_204),
}


@pytest.mark.parametrize("name", RECIPES)
def test_the_recipes_are_llm_cs(resolved, name):
    training, optimizer = resolved(name).training, resolved(name).optimizer
    tokens = training.batch_size * training.micro_batches * training.sequence_length
    assert RECIPES[name] == (tokens, optimizer.learning_rate, optimizer.final_fraction, training.steps)
    assert (optimizer.weight_decay, optimizer.warmup_steps, training.evaluate_every) == (0.1, 700, 250)
    assert (optimizer.beta1, optimizer.beta2, optimizer.clip_norm, optimizer.schedule) == (0.9, 0.95, 1.0, "cosine")


def test_shakespeare_char_is_nanogpts_setting_for_a_cpu(resolved):
    """train_shakespeare_char.py with the README's changes for a CPU."""
    config = resolved("shakespeare_char")
    assert (config.model.layers, config.model.heads, config.model.width, config.model.context) == (4, 4, 128, 64)
    assert (config.training.steps, config.training.batch_size, config.training.micro_batches) == (2000, 12, 1)
    optimizer = config.optimizer
    assert (optimizer.learning_rate, optimizer.schedule, optimizer.warmup_steps) == (1e-3, "cosine", 100)
    assert optimizer.learning_rate * optimizer.final_fraction == pytest.approx(1e-4)
    assert (optimizer.beta1, optimizer.beta2, optimizer.weight_decay, optimizer.clip_norm) == (0.9, 0.99, 0.1, 1.0)
    assert (config.data.text, config.data.tokenizer, config.data.validation_fraction) == (
        "tinyshakespeare",
        "characters",
        0.1,
    )
