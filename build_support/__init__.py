"""How bertkd is built: what this machine can compile, with what flags, and a record of it for ``bertkd info``."""
