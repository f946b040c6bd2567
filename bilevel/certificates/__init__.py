"""Certificates of hypergradients: :func:`certify` estimates and bounds the error, and corrects the gradient."""

from bilevel.certificates.certificate import Certificate, CertificateKind, Finding, certify
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
