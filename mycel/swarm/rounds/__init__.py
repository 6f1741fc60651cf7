"""Rounds without a leader: contribution -> aggregate -> apply, committed by a certificate."""
