"""Learning from tasks: a task's bilevel problem, networks, the tasks themselves, and the algorithms' meta-gradients."""
