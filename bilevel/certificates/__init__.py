"""How far a hypergradient may be from the exact one, said after the fact by :func:`certify`; constants it takes."""

from bilevel.certificates.certify import Certificate, CertificateKind, Finding, certify
from bilevel.certificates.lipschitz import HALF_SQUARED, LOGISTIC, SOFTMAX, Ball, LinearLoss, Lipschitz

__all__ = [
    "HALF_SQUARED",
    "LOGISTIC",
    "SOFTMAX",
    "Ball",
    "Certificate",
    "CertificateKind",
    "Finding",
    "LinearLoss",
    "Lipschitz",
    "certify",
]
