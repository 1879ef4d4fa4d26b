"""The subcommands of `timm-eed`, a file each."""
