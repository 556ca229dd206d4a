"""Problems that a policy learns from, with their configuration."""

from typing import NamedTuple

from jaxgpt.commands import configuration
from jaxgpt.commands.batches import Batches, Setting
from jaxgpt.commands.policy_batches import PolicyBatches, ProblemData
from jaxgpt.data import chat_templates, corpora, fingerprint, loader, problems, sources
from jaxgpt.errors import UserError
from jaxgpt.evaluation import rewards
from jaxgpt.evaluation.rewards import Reward
from jaxgpt.options.config import Config


class PolicySource(NamedTuple):
    """Problems with their configuration and their reward; a `batches.Source`."""

    data: ProblemData
    config: Config
    reward: Reward

    def about(self) -> str:
        found, options = self.data.problems, self.config.rollouts
        return (
            f"{self.data.description}: {len(found.train):,} problems to learn from, {len(found.validation):,} to "
            f"validate on; {options.answers} answers to each prompt, of at most {options.tokens} tokens, rewarded by "
            f"{self.config.objective.reward}"
        )

    def afterwards(self, run: str) -> tuple[str, list[str]]:
        return "more answers", ["generate", run, "--chat"]

    def batches(self, setting: Setting) -> Batches:
        return PolicyBatches(self.data, self.reward, setting)


def open_source(config: Config) -> PolicySource:
    """Reads the problems that the options name. UserError where there are none, or for options that don't fit."""
    _check(config)
    reward = rewards.make(config.objective)
    tokenizer, template, notes = configuration.language(config)
    config = configuration.resolve(config, tokenizer, conversations=False)
    longest = min(config.training.sequence_length + 1, config.model.context) - config.rollouts.tokens
    paths = list(sources.here(sources.find((config.data.text,))))
    found = problems.read(
        paths, template, tokenizer, longest, config.data.validation_fraction, config.data.skip_bad, "--data.skip-bad"
    )
    for problem in (*found.train, *found.validation):
        loader.check_vocabulary(problem.tokens, config.model.vocabulary_size, f"--data.text {config.data.text}")
    if found.left_out:
        notes.append(
            f"{len(found.left_out):,} problems are left out, since their prompts have more than {longest:,} tokens; "
            f"the first is {found.left_out[0]}"
        )
    end = chat_templates.end_of_turn(template)
    return PolicySource(
        ProblemData(
            description=config.data.text,
            tokenizer=tokenizer,
            prompt=None,
            fingerprint=fingerprint.of_lines(paths),
            template=template.state(),
            notes=tuple(notes),
            problems=found,
            stops=(end,) if end else (),
        ),
        config,
        reward,
    )


def _check(config: Config) -> None:
    """Raises a UserError for options without which there is nothing to learn from, or which don't fit together."""
    options, drawn, training, text = config.objective, config.rollouts, config.training, config.data.text
    answers = training.micro_batches * training.batch_size * drawn.minibatches
    for wrong, message in (
        (
            not training.init_from,
            "--objective.name policy goes on from a model that was fine-tuned on conversations: name its run or its "
            "weights with --init-from",
        ),
        (
            text in (*corpora.NAMES, *sources.DATA_SETS),
            f"--data.text is {text}, and --objective.name policy learns from problems: name a file of JSON lines such "
            'as {"prompt": "2 + 2?", "answer": "4"}',
        ),
        (bool(config.data.mixture), "--data.mixture is of plain text: name problems with --data.text"),
        (config.data.document_mask, "--data.document-mask is of plain text: leave it away with problems"),
        (
            answers % drawn.answers > 0,
            f"a rollout has {answers} answers (--training.batch-size × --training.micro-batches × "
            f"--rollouts.minibatches), which can't be groups of {drawn.answers} (--rollouts.answers)",
        ),
        (
            options.advantages == "group" and drawn.answers < 2,
            "--objective.advantages group needs at least 2 answers to a prompt (--rollouts.answers)",
        ),
        (
            (options.advantages == "values") != (options.value_coefficient > 0),
            "--objective.advantages values and a --objective.value-coefficient above 0 go together: advantages are "
            "made of the value head's values, which alone train it",
        ),
        (
            options.kl_target > 0 and not options.kl_penalty,
            "--objective.kl-target changes --objective.kl-penalty, which is 0: give where it begins",
        ),
        (
            training.steps % drawn.steps > 0,
            f"--training.steps is {training.steps}, and must be a multiple of the steps of a rollout, {drawn.steps} "
            "(--rollouts.minibatches × --rollouts.epochs)",
        ),
    ):
        if wrong:
            raise UserError(message)
