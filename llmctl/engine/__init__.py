"""Engine core: requests, block pool, scheduler, sampling parameters, the step loop. No device imports."""
