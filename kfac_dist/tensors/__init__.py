"""Pure tensor code: packing, encoding, copies; importable without MPI."""
