"""Start the pre-training program on several hosts: settings written once, checked everywhere, one front for all."""
