"""Three hints to each gradient of notebook 23: where to begin, what is easily missed, nearly the formula."""

SUM = "Where does it stand in the forward? The gradient is the sum over these places, of ∂ there times the factor."

HINTS: dict[str, tuple[str, str, str]] = {
    "linear.x": (SUM, "x_nc is in every y_nf of its row, with the factor w_cf.", "A product of dy and w turned."),
    "linear.w": (SUM, "w_cf is in y_nf of every row n, with the factor x_nc.", "A product of x turned and dy."),
    "linear.b": (SUM, "b_f is in y_nf of every row n, with the factor 1.", "A sum of dy over one axis. Which?"),
    "embedding.token": (
        SUM,
        "A row that is read three times gets the sum of three rows of dy; one that is never read gets zeros.",
        "Zeros of the table's shape, and .at[tokens].add(dy), which adds where an index comes twice.",
    ),
    "embedding.position": (
        SUM,
        "Row t is read at place t of every sequence, and the rows beyond the text by nobody.",
        "dy summed over the sequences, in the first T rows of zeros of the table's shape.",
    ),
    "layernorm.x": (
        "x_j moves every x̂_i of its token, in three ways: by itself, through μ and through σ.",
        "∂μ/∂x_j = 1/C and ∂σ/∂x_j = x̂_j/C. Each of the three ways is a term.",
        "With g = γ ∂y: g less its mean, less x̂ times the mean of g x̂, and all of it over σ.",
    ),
    "layernorm.scale": (SUM, "γ_i is in y_ni of every token, with the factor x̂_ni.", "Sum dy x̂ over the tokens."),
    "layernorm.bias": (SUM, "β_i is in y_ni of every token, with the factor 1.", "Sum dy over the tokens."),
    "gelu.x": (
        "y = x s(x): the product rule has two terms.",
        "With s = (1 + tanh u)/2, s' = 2 s (1 - s) u'.",
        "u' = √(2/π) (1 + 3 · 0.044715 x²). And don't forget ∂y.",
    ),
    "attention.q": (
        "Go back line by line: out = p v, p = softmax(s), s = q kᵀ/√D.",
        "∂p = ∂out vᵀ. The softmax's backward is ∂s = p (∂p - δ), with one δ for each query.",
        "δ = Σ_j p ∂p over the keys; then ∂q = ∂s k / √D.",
    ),
    "attention.k": (
        "As q's until ∂s. Where does k_j stand then?",
        "k_j is in s_tj of every query t, with the factor q_t/√D.",
        "∂k = ∂sᵀ q / √D.",
    ),
    "attention.v": (SUM, "v_j is in out_t of every query t, with the factor p_tj.", "p turned, times dout."),
    "residual.x": ("y = x + branch.", "Its factor is 1.", "It is dy."),
    "residual.branch": ("y = x + branch.", "Its factor is 1, and no sum is lost on the way.", "It is dy too."),
    "cross_entropy.logits": (
        "loss = logsumexp(z) - z_target, for each token by itself.",
        "The derivative of the logsumexp is the softmax.",
        "(softmax - onehot), each row times its token's dloss.",
    ),
    "unembedding.x": (
        "z = x Wᵀ, and the loss is the mean of the cross-entropies over N tokens.",
        "∂z = (softmax(z) - onehot)/N. Then it is a linear layer.",
        "∂z W.",
    ),
    "unembedding.w": (
        "z = x Wᵀ, and the loss is the mean of the cross-entropies over N tokens.",
        "∂z = (softmax(z) - onehot)/N, and W_v is in z_nv of every token.",
        "∂z turned, times x.",
    ),
    "rmsnorm.x": (
        "x_j moves every x̂_i of its token, in two ways: by itself and through σ.",
        "∂σ/∂x_j = x̂_j/C. Nothing was subtracted, so there is no term of a mean.",
        "With g = γ ∂y: g less x̂ times the mean of g x̂, over σ.",
    ),
    "rmsnorm.scale": (SUM, "γ_i is in y_ni of every token, with the factor x̂_ni.", "Sum dy x̂ over the tokens."),
    "rotary.x": (
        "Forward turns the pair (x_i, x_{i+D/2}) by the angle. What undoes a turn?",
        "The transpose of a rotation is the rotation by the opposite angle.",
        "∂a = ∂y cos + ∂z sin and ∂b = ∂z cos - ∂y sin, for the halves (y, z) of dy.",
    ),
    "swiglu.gate": (
        "y = silu(g) u. Only silu depends on g.",
        "silu = g s, so the product rule has two terms, and s' = s (1 - s).",
        "dy u s (1 + g (1 - s)).",
    ),
    "swiglu.up": ("y = silu(g) u.", "The factor of u is silu(g) = g s.", "dy g s."),
    "soft_cap.x": (
        "y = c tanh(x/c), and tanh' = 1 - tanh².",
        "You are given y, and tanh(x/c) = y/c. The inner 1/c cancels the outer c.",
        "dy (1 - (y/c)²).",
    ),
    "lora.x": ("x is in two products: x w, and x a.", "∂h = s ∂y bᵀ comes back through a.", "∂y wᵀ + ∂h aᵀ."),
    "lora.a": ("y = x w + s h b with h = x a.", "First ∂h = s ∂y bᵀ.", "∂a = xᵀ ∂h."),
    "lora.b": ("y = x w + s h b with h = x a.", "b_r is in every row, with the factor s h_nr.", "s hᵀ ∂y."),
    "scalar_head.x": ("y_n = x_n · w + b.", "x_nc has the factor w_c.", "An outer product of dy and w."),
    "scalar_head.w": ("y_n = x_n · w + b.", "w_c is in every y_n, with the factor x_nc.", "dy times x, summed over n."),
    "scalar_head.b": ("y_n = x_n · w + b.", "b is in every y_n, with the factor 1.", "The sum of dy: one number."),
    "entropy.logits": (
        "H = -Σ p log p. First ∂H/∂p, then the softmax's backward.",
        "(p log p)' = log p + 1, and ∂p_i/∂z_j = p_i ([i = j] - p_j); the ones cancel.",
        "-p (log p + H), each row times its token's dentropy.",
    ),
    "router.x": (
        "The weights are a softmax over the k chosen scores; the others get nothing.",
        "∂s_cj = g_j (∂g_j - Σ_m g_m ∂g_m), put at the places chosen[n, j] of an (N, E) of zeros.",
        "Then it is a linear layer: ∂s wᵀ.",
    ),
    "router.w": (
        "The weights are a softmax over the k chosen scores; the others get nothing.",
        "∂s_cj = g_j (∂g_j - Σ_m g_m ∂g_m), put at the places chosen[n, j] of an (N, E) of zeros.",
        "Then it is a linear layer: xᵀ ∂s.",
    ),
    "dropout.x": (
        "y_i = m_i x_i, with m_i = 1/(1 - p) or 0. What of y depends on x_i?",
        "m doesn't depend on x. So the factor is m_i, 1/(1 - p) included.",
        "dy where the mask is, over 1 - p; elsewhere 0.",
    ),
    "moe.g": (
        "y_n = Σ_j g_nj o_nj, with o the experts' outputs, a w_out. y is linear in g.",
        "∂g_nj = ∂y_n · o_nj: one number for each pair of a token and an expert.",
        "With b = dy w_out[chosen]ᵀ (N, k, F): the sum of a b over F, where a = silu(gate) up.",
    ),
    "moe.w_out": (
        "y_n = Σ_j g_nj a_nj w_out[c_nj]. Where does the matrix of expert e stand?",
        "In y of each token that chose e, with the factor g a; of the tokens that didn't, nothing comes.",
        "Zeros of its shape, and .at[chosen].add of the outer products of g a and dy, (N, k, F, C).",
    ),
    "moe.w_in": (
        "Go back line by line: y = Σ g a w_out, a = silu(gate) up, [gate|up] = x w_in.",
        "∂a = g dy w_outᵀ. SwiGLU's backward makes ∂gate and ∂up of it, side by side.",
        "Zeros of its shape, and .at[chosen].add of the outer products of x and [∂gate|∂up], (N, k, C, 2F).",
    ),
    "moe.x": (
        "As w_in's until [∂gate|∂up]. Where does x_n stand then?",
        "In gate and up of each of its k experts: k terms, each through its own expert's matrix.",
        "[∂gate|∂up] w_in[chosen]ᵀ, summed over j.",
    ),
    "fp8.x": (
        "y = x̂ ŵ + β. Through the rounding ∂x = ∂x̂ (straight-through).",
        "Then it is a linear layer, of ŵ. But a product of 8 bits has two factors of 8 bits.",
        "ĝ ŵᵀ, where ĝ is dy_hat.",
    ),
    "fp8.w": (
        "y = x̂ ŵ + β. Through the rounding ∂w = ∂ŵ (straight-through).",
        "Then it is a linear layer, of x̂. But a product of 8 bits has two factors of 8 bits.",
        "x̂ᵀ ĝ, where ĝ is dy_hat.",
    ),
    "fp8.b": (SUM, "β_f is in y_nf of every row, with the factor 1, and in no product.", "A sum of dy, not of dy_hat."),
}
