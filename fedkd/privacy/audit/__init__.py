"""Attacks that try to refute a claimed epsilon. See ``bounds`` for what they prove, ``attack`` for a finished run."""
