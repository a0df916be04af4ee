"""LoRA adapters in inference: which can be merged exactly, and the merge."""


def merge_lora(model):
    """Merge the LoRA adapter of a `PeftModel` into float32 weights, and return the base model."""
    from peft.tuners.lora import LoraLayer

    for layer in model.modules():
        if isinstance(layer, LoraLayer):
            layer.get_base_layer().float()
    return model.merge_and_unload()


def has_other_adapter(model):
    """Whether a `PeftModel` has anything but plain LoRA on inner linear layers: DoRA, a tuned LM head, a prompt..."""
    import torch
    from peft.tuners.lora import LoraLayer, LoraModel

    head = model.get_output_embeddings()
    layers = [layer for layer in model.modules() if isinstance(layer, LoraLayer)]
    inner = all(isinstance(layer.get_base_layer(), torch.nn.Linear) and layer is not head for layer in layers)
    saved = any(config.modules_to_save for config in model.peft_config.values())
    return not (isinstance(model.base_model, LoraModel) and inner) or saved or any(x.lora_variant for x in layers)
