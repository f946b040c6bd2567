"""Meta-learning: few-shot tasks, networks, the bilevel problem of one task, and the algorithms' meta-gradients."""
