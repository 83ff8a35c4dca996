"""One adapter: as factors, as the files of PEFT, as layers on a model; how adapters and runs are found."""
