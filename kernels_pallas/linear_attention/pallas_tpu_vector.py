"""A chunk of the TPU kernels with a decay a key channel. README.md has the derivation."""


def vector_forward(q, k, v, g, state):
    raise NotImplementedError


def next_state_vector(k, v, g, state):
    raise NotImplementedError


def vector_backward(q, k, v, dy, g, state, dstate):
    raise NotImplementedError
