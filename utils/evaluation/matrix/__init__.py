"""Several domain and several task adapters: which pairs compose. One table, one heat map, a reason for every gap."""
