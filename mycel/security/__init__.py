"""Whom we believe: identities, signed envelopes, admission and limits."""
