"""A teacher as a service: it answers inputs with soft labels over TLS, and keeps account of who asked what."""
