"""What a step of each optimizer costs on a model; on the command line, `steepest bench`."""
