"""The frame loop of the device side: buffers, exit policies, the chain of engines."""
