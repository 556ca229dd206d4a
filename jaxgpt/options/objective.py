"""Options of what is minimised, of what is drawn for it, and of what is trained; a part of `config.py`."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Objective:
    """Objective that training minimises, and its coefficients."""

    name: Literal["next_token", "reward", "preference", "policy"] = "next_token"
    """Training objective: the next token, also of conversations; a reward model of comparisons; comparisons directly
    (DPO and its relatives); or a policy's advantages (REINFORCE, PPO, GRPO)."""
    completions: int = 2
    """reward: number of texts of a ranking that are compared at once (K)."""
    centre: float = 0.0
    """reward: coefficient of the squared sum of the two scores of a pair, which keeps scores around 0."""
    preference_loss: Literal["sigmoid", "square"] = "sigmoid"
    """preference: DPO's loss of a pair's margin, or IPO's."""
    beta: float = 0.1
    """preference: strength with which the model is held to its reference; larger keeps it closer."""
    length_normalised: bool = False
    """preference: divide a text's log-probability by its number of tokens."""
    reference_free: bool = False
    """preference: compare the model's own log-probabilities, without a reference (SimPO)."""
    margin: float = 0.0
    """preference: margin that the chosen text has to exceed (SimPO's gamma)."""
    label_smoothing: float = 0.0
    """preference: share of comparisons that are assumed to be the wrong way round."""
    surrogate: Literal["clipped", "reinforce"] = "clipped"
    """policy: loss of the policy: PPO's clipped ratio, or the log-likelihood weighted by the advantage."""
    clip: float = 0.2
    """policy: distance from 1 at which the ratio of new to old probabilities is clipped, below 1, and above it if
    clip-above is 0."""
    clip_above: float = 0.0
    """policy: distance above 1 at which the ratio is clipped; 0 takes `clip`."""
    kl: Literal["k1", "k2", "k3"] = "k3"
    """policy: estimator of the divergence from the reference in the loss."""
    kl_coefficient: float = 0.0
    """policy: coefficient of that divergence; 0 for none."""
    entropy_coefficient: float = 0.0
    """policy: coefficient of the entropy, which is maximised."""
    value_coefficient: float = 0.0
    """policy: coefficient of the value head's loss; 0 for no value head."""
    value_clip: float = 0.2
    """policy: distance from its old value at which a value is clipped; 0 for no clipping."""
    kl_penalty: float = 0.0
    """policy: coefficient of the divergence from the reference that is subtracted from each token's reward; 0 for
    none."""
    kl_target: float = 0.0
    """policy: divergence of an answer, in nats, that kl-penalty is adapted to; 0 keeps kl-penalty constant."""
    reward: str = ""
    """policy: source of the reward: exact or exact:MARKER (the problem's answer, alone or behind a marker),
    regex:PATTERN, program:COMMAND (its exit status), FILE.py:FUNCTION (of a text), or model:RUN (a reward model)."""
    program_seconds: float = 5.0
    """policy: seconds that a reward's program may take."""
    program_memory_mib: int = 1024
    """policy: memory that each process of a reward's program may have, in MiB."""
    advantages: Literal["group", "values", "reward"] = "group"
    """policy: kind of advantage: an answer's reward less the mean of its group (GRPO), generalised advantages with a
    value head (PPO), or the reward itself."""
    divide_by_deviation: bool = True
    """policy: divide a group's advantages by their standard deviation."""
    answers_alike: bool = False
    """policy: weigh all answers alike in the loss, instead of all tokens."""
    discount: float = 1.0
    """policy: discount of a reward for each token before it; 1 for none."""
    advantage_decay: float = 0.95
    """policy: decay of the generalised advantages (λ): 1 relies on the rewards that came, 0 on the value of the next
    token."""
    whiten: bool = False
    """policy: scale the advantages of a rollout to mean 0 and standard deviation 1."""

    @property
    def scalar_head(self) -> bool:
        """Returns whether the model has a scalar head, for scores or for values."""
        return self.name == "reward" or (self.name == "policy" and self.value_coefficient > 0)

    @property
    def rewarded_by_a_program(self) -> bool:
        """Returns whether the reward is a function or a program, which only a command line or a --config may name."""
        return self.reward.startswith("program:") or ".py:" in self.reward

    @property
    def classifies(self) -> bool:
        """Returns whether logits are computed; a reward model has none."""
        return self.name != "reward"

    @property
    def has_reference(self) -> bool:
        """Returns whether a policy is kept near the weights that it began with."""
        return self.kl_coefficient > 0 or self.kl_penalty > 0

    @property
    def texts(self) -> int:
        """Returns the number of texts in one of a batch's `batch_size` rows."""
        return {"reward": self.completions, "preference": 2}.get(self.name, 1)


@dataclass(frozen=True)
class Rollouts:
    """Drawing of a policy's answers, from which it learns. A rollout is what is drawn with the same weights."""

    answers: int = 8
    """Number of answers to each prompt (G)."""
    tokens: int = 64
    """Largest number of tokens in an answer."""
    minibatches: int = 1
    """Number of steps among which a rollout's answers are divided."""
    epochs: int = 1
    """Number of times that each of a rollout's answers is trained on."""

    @property
    def steps(self) -> int:
        """Returns the number of steps that are taken with one rollout."""
        return self.minibatches * self.epochs


@dataclass(frozen=True)
class Lora:
    """Low-rank adapters (LoRA): the weights that the run begins with stay as they are, and small matrices beside them
    are trained."""

    rank: int = 0
    """Rank of the adapters (R); 0 trains all of the model's parameters instead."""
    alpha: float = 16.0
    """Scale of the adapters: their products are multiplied by alpha / rank."""
    targets: tuple[str, ...] = ("all-linear",)
    """Names or patterns of the projections that have an adapter, such as q_proj v_proj, c_attn or mlp.*; all-linear
    for all in the blocks."""
    base: Literal["float32", "bfloat16", "int8", "nf4"] = "bfloat16"
    """Type in which the frozen weights are stored: of 32, 16, 8 or 4 bits."""
    double_quantization: bool = False
    """Store the scales of int8 and nf4 in 8 bits too: 0.13 bits a number instead of 0.5."""
    adapters: str = ""
    """Adapters to train on: a folder of PEFT's, or a run's. Rank, alpha and targets come with them, and so does the
    base unless --init-from names it; empty begins new ones."""
