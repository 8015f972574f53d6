"""At which block does replacing the trigger's activations remove a planted behaviour?"""
