"""What SGLang's model registry takes in: each module names its class as `EntryClass`."""
