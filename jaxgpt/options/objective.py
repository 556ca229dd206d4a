"""Options of what is minimised, of what is drawn for it, and of what is trained; a part of `config.py`."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Objective:
    """Objective that training minimises, and its coefficients."""

    name: Literal["next_token", "reward", "preference", "policy"] = "next_token"
    """The next token, also of conversations; a reward model's comparisons; comparisons directly (DPO and its
    relatives); or a policy's advantages (REINFORCE, PPO, GRPO)."""
    completions: int = 2
    """reward: number of texts of a ranking that are compared at once (K)."""
    centre: float = 0.0
    """reward: coefficient of the squared sum of the two scores of a pair, which keeps scores around 0."""
    preference_loss: Literal["sigmoid", "square"] = "sigmoid"
    """preference: DPO's loss of a pair's margin, or IPO's."""
    beta: float = 0.1
    """preference: how closely the model stays to its reference: larger is closer."""
    length_normalised: bool = False
    """preference: divide a text's log-probability by its number of tokens."""
    reference_free: bool = False
    """preference: compare the model's own log-probabilities, without a reference (SimPO)."""
    margin: float = 0.0
    """preference: what the chosen text's margin has to exceed (SimPO's gamma)."""
    label_smoothing: float = 0.0
    """preference: share of comparisons that are taken to be the wrong way round."""
    surrogate: Literal["clipped", "reinforce"] = "clipped"
    """policy: PPO's clipped ratio, or the log-likelihood weighted by the advantage."""
    clip: float = 0.2
    """policy: how far below 1 the ratio of new to old probabilities counts, and above where `clip_above` says
    nothing."""
    clip_above: float = 0.0
    """policy: how far above 1 it counts; 0 takes `clip`."""
    kl: Literal["k1", "k2", "k3"] = "k3"
    """policy: estimator of the divergence from the reference, in the loss."""
    kl_coefficient: float = 0.0
    """policy: coefficient of that divergence; 0 for none."""
    entropy_coefficient: float = 0.0
    """policy: coefficient of the entropy, which is added to what is maximised."""
    value_coefficient: float = 0.0
    """policy: coefficient of the value head's loss; 0 for no value head."""
    value_clip: float = 0.2
    """policy: how far from its old value a value counts; 0 for any distance."""
    kl_penalty: float = 0.0
    """policy: coefficient of the divergence from the reference by which each token's reward is less; 0 for none."""
    kl_target: float = 0.0
    """policy: divergence of an answer, in nats, near which `kl_penalty` keeps it by changing; 0 leaves it as it is."""
    reward: str = ""
    """policy: what is rewarded: exact or exact:MARKER (the problem's answer, alone or behind a marker), regex:PATTERN,
    program:COMMAND (its exit status), FILE.py:FUNCTION (of a text), or model:RUN (a reward model)."""
    program_seconds: float = 5.0
    """policy: time that such a program may take."""
    program_memory_mib: int = 1024
    """policy: memory, in MiB, that each process of such a program may have."""
    advantages: Literal["group", "values", "reward"] = "group"
    """policy: an answer's reward less the mean of its group (GRPO), generalised advantages with a value head (PPO), or
    the reward itself."""
    divide_by_deviation: bool = True
    """policy: divide the group's advantages by its deviation."""
    answers_alike: bool = False
    """policy: every answer weighs the same in the loss, and not every token."""
    discount: float = 1.0
    """policy: what a reward is worth a token earlier."""
    advantage_decay: float = 0.95
    """policy: decay of the generalised advantages: 1 for the reward that came, 0 for the value of the next token."""
    whiten: bool = False
    """policy: scale the advantages of a rollout to the mean 0 and the deviation 1."""

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
    """Most tokens of an answer."""
    minibatches: int = 1
    """Number of steps that a rollout's answers are divided among."""
    epochs: int = 1
    """Times that each of a rollout's answers is trained on."""

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
    """The adapters' products are multiplied by alpha / rank."""
    targets: tuple[str, ...] = ("all-linear",)
    """Names or patterns of the projections that have an adapter, such as q_proj v_proj, c_attn or mlp.*; all-linear
    for all in the blocks."""
    base: Literal["float32", "bfloat16", "int8", "nf4"] = "bfloat16"
    """Form in which the weights that are not trained are kept: of 32, 16, 8 or 4 bits."""
    double_quantization: bool = False
    """Keep the scales of int8 and nf4 in 8 bits too: 0.13 bits a number in place of 0.5."""
    adapters: str = ""
    """Adapters to train on: PEFT's folder of them, or a run's. Rank, alpha and targets are theirs, and so is the base
    unless --init-from names it; empty begins new ones."""
