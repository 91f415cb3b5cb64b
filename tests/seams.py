"""Everything of transformers, torch and other libraries that we override or use privately, and why.

A new version may change any of it. tests/test_seams.py finds what our sources override and use, compares it with these
tables (none may be missing or superfluous), and checks that each entry exists with the signature written here. If it
fails, look at what the new version does, fix our code, then change the entry.
"""

# For each base class of a library: the methods that our class overrides, and the private attributes that it sets.
OVERRIDDEN = {
    "transformers.Seq2SeqTrainer": {
        # data
        "_get_train_sampler(self, train_dataset=None)": "batches are bounded by tokens, not by rows",
        "_get_eval_sampler(self, eval_dataset)": "batches are bounded by tokens, the longest rows first",
        "get_train_dataloader(self)": "a stream divides its batches among the processes itself",
        "get_test_dataloader(self, test_dataset)": "rows keep their order, since predictions are matched with them",
        "get_batch_samples(self, epoch_iterator, num_batches, device)": (
            "stores the position in a stream for resuming, and counts what each corpus gives"
        ),
        "_set_signature_columns_if_needed(self)": "keeps the corpus of each row in the batch, to count it",
        # the loop
        "train(self, resume_from_checkpoint=None, trial=None, ignore_keys_for_eval=None)": "listens to signals",
        "_prepare_for_training(self, max_steps, train_dataloader, resume_from_checkpoint)": (
            "with FSDP2, tied embeddings stay in one group, and gradients add up in float32; there is no hook for it"
        ),
        "set_initial_training_values(self, args, dataloader)": "with stages, only max_steps ends the run",
        "log(self, logs, start_time=None)": "logs what each corpus has given",
        "_init_training_state(self, max_steps, num_update_steps_per_epoch, num_train_epochs, resume_from_checkpoint, "
        "trial)": "a resumed run takes the intervals of logging, evaluating and saving from its own command line",
        "_run_epoch(self, model, epoch, train_dataloader, steps_in_epoch, num_update_steps_per_epoch, trial, "
        "ignore_keys_for_eval, start_time, resume_from_checkpoint, epochs_trained, steps_trained_in_current_epoch)": (
            "sets the sampler's epoch and the stream's position, takes the rows of the stage, and makes no update if "
            "the run has ended"
        ),
        "_maybe_log_save_evaluate(self, tr_loss, grad_norm, model, trial, epoch, ignore_keys_for_eval, start_time, "
        "learning_rate=None)": "stops after a signal, or when the run has diverged; callbacks cannot save in between",
        "_finalize_training(self, trial, num_train_samples, start_time)": "reports the time of the whole resumed run",
        "create_optimizer(self, model=None)": "names the recipe's field in errors",
        "create_scheduler(self, num_training_steps, optimizer=None)": "names the recipe's fields in errors, and finds "
        "errors that would occur only at the last update",
        "compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None)": "adds the loss of R-Drop",
        # evaluation
        "_evaluate(self, trial, ignore_keys_for_eval, skip_scheduler=False)": "evaluates the mean of the weights",
        "evaluation_loop(self, dataloader, description, prediction_loss_only=None, ignore_keys=None, "
        "metric_key_prefix='eval')": "the loss is the mean over all target tokens, not over the means of batches",
        "prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None, **gen_kwargs)": (
            "sums the loss and counts its tokens, and restores the generation config that the stock step changes"
        ),
        # checkpoints
        "_save_checkpoint(self, model, trial)": "writes a checkpoint atomically",
        "_save_rng_state(self, output_dir)": "also saves the position in a stream",
        "save_model(self, output_dir=None, _internal_call=False)": "saves the mean of the weights; refuses NaN or inf",
        "_save(self, output_dir=None, state_dict=None)": "stores a tied tensor of a sharded model only once",
        "_load_from_checkpoint(self, resume_from_checkpoint, model=None)": "refuses weights of a run with FSDP in a "
        "run without it, and the reverse",
        "_load_optimizer_and_scheduler(self, checkpoint)": "loads the mean of the weights",
        "_load_best_model(self)": "loads the best mean of the weights",
        "_issue_warnings_after_load(self, load_result)": "refuses weights of another model (stock only warns)",
        # the Hub
        "init_hf_repo(self, token=None, private=None)": "creates the repository before the first update",
        "push_to_hub(self, commit_message='End of training', blocking=True, token=None, revision=None, private=None, "
        "**kwargs)": "pushes the run's folder with our card, after the scores are written",
        "_push_from_checkpoint(self, checkpoint_folder)": "pushes the checkpoint's model, not the whole folder",
    },
    "transformers.TrainerCallback": {
        "on_evaluate(self, args, state, control, **kwargs)": "the public way to react to an event",
        "on_train_begin(self, args, state, control, **kwargs)": "the public way to react to an event",
        "on_train_end(self, args, state, control, **kwargs)": "the public way to react to an event",
        "on_epoch_begin(self, args, state, control, **kwargs)": "the public way to react to an event",
        "on_epoch_end(self, args, state, control, **kwargs)": "the public way to react to an event",
        "on_step_end(self, args, state, control, **kwargs)": "the public way to react to an event",
        "on_log(self, args, state, control, **kwargs)": "the public way to react to an event",
    },
    "transformers.EarlyStoppingCallback": {
        "on_train_begin(self, args, state, control, **kwargs)": "keeps its count when a run resumes",
    },
    "transformers.HfArgumentParser": {
        "error(self, message)": "raises our error instead of ending the process",
        "format_help(self)": "shows the fields in groups, ours before transformers'",
        "parse_args_into_dataclasses(self, args=None, return_remaining_strings=False, look_for_args_file=True, "
        "args_filename=None, args_file_flag=None)": "reports an unknown option with `error()`",
    },
    "argparse.ArgumentParser": {
        "error(self, message)": "one line, without the usage",
    },
    "sacrebleu.metrics.base.Metric": {
        "_preprocess_segment(self, sent)": "what sacrebleu asks a metric for",
        "_extract_reference_info(self, refs)": "what sacrebleu asks a metric for",
        "_compute_segment_statistics(self, hypothesis, ref_kwargs)": "what sacrebleu asks a metric for",
        "_compute_score_from_stats(self, stats)": "what sacrebleu asks a metric for",
        "_aggregate_and_compute(self, stats)": "what sacrebleu asks a metric for",
    },
    "evaluate.Metric": {
        "_info(self)": "defines a metric for evaluate",
        "_compute(self, *, predictions=None, references=None, **kwargs)": "defines a metric for evaluate",
        "_build_data_dir(self)": "writes no folder: that could fail after everything has been translated",
    },
    "transformers.PreTrainedConfig": {
        "validate_architecture(self)": "checks our fields; run whenever a config is made",
        "validate_token_ids(self)": "refuses ids outside of the vocabularies; the stock method only warns",
    },
    "transformers.PreTrainedModel": {
        "_init_weights(self, module)": "the initialisation: Xavier, as in the code of the paper",
        "get_input_embeddings(self)": "tells transformers about the embeddings",
        "set_input_embeddings(self, value)": "tells transformers about the embeddings, shared or not",
        "_resize_token_embeddings(self, new_num_tokens, pad_to_multiple_of=None, mean_resizing=True)": (
            "refuses two vocabularies, and keeps decoder_vocab_size right"
        ),
        "get_expanded_tied_weights_keys(self, all_submodels=False)": (
            "the stock method unties everything with tie_word_embeddings=False; ours has a switch for each sharing"
        ),
        "init_parallel_plans(self)": "the config's plans name the modules of the whole model; stacks have no plans",
        "_no_split_modules": "tells transformers which layers stay on one device",
        "_supports_sdpa": "tells transformers which attention there is",
        "_supports_flash_attn": "tells transformers which attention there is",
        "_supports_flex_attn": "tells transformers which attention there is",
        "_can_compile_fullgraph": "tells transformers that torch.compile takes the whole network",
        "_can_record_outputs": "tells transformers where hidden states and attentions come from",
        "_tp_plan": "tells transformers about tensor parallelism",
        "_pp_plan": "tells transformers about pipeline parallelism",
        "_fsdp_plan": "tells transformers about FSDP2",
    },
    "transformers.modeling_outputs.Seq2SeqLMOutput": {
        "to_tuple(self)": "raises an error if the logits were not computed",
    },
    "transformers.GenerationMixin": {
        "generate(self, inputs=None, generation_config=None, logits_processor=None, stopping_criteria=None, "
        "prefix_allowed_tokens_fn=None, synced_gpus=None, assistant_model=None, streamer=None, "
        "negative_prompt_ids=None, negative_prompt_attention_mask=None, custom_generate=None, **kwargs)": (
            "decodes with our engines, and accepts our options"
        ),
        "adjust_generation_fn(self, generation_config, from_auto_class, from_pipeline, pretrained_model_name_or_path, "
        "cache_dir, force_download, proxies, local_files_only, token, revision, subfolder, trust_remote_code, "
        "**kwargs)": "a model without generation_config.json has the paper's defaults",
        "prepare_inputs_for_generation(self, input_ids, next_sequence_length=None, past_key_values=None, "
        "attention_mask=None, inputs_embeds=None, is_first_iteration=False, **kwargs)": (
            "adds the target's positions: the mask of a static cache does not show them"
        ),
        "_prepare_generated_length(self, generation_config, has_default_max_length, has_default_min_length, "
        "model_input_name, input_ids_length, inputs_tensor)": (
            "the default limit is 50 tokens more than the source; transformers' is 20 tokens"
        ),
    },
    "transformers.Pipeline": {
        "_sanitize_parameters(self, **pipeline_parameters)": "tells transformers about a pipeline's options",
        "preprocess(self, input_, **preprocess_parameters)": "tells transformers about a pipeline's steps",
        "_forward(self, input_tensors, **forward_parameters)": "tells transformers about a pipeline's steps",
        "postprocess(self, model_outputs, **postprocess_parameters)": "tells transformers about a pipeline's steps",
        "run_single(self, inputs, preprocess_params, forward_params, postprocess_params)": "treats one text like many",
        "get_iterator(self, inputs, num_workers, batch_size, preprocess_params, forward_params, postprocess_params)": (
            "makes batches of sentences of similar length, from many texts; stock batches whole texts"
        ),
        "save_pretrained(self, save_directory, **kwargs)": "saves this file beside the model, as custom code",
        "_load_tokenizer": "tells transformers what a pipeline loads",
        "_load_processor": "tells transformers what a pipeline loads",
        "_load_image_processor": "tells transformers what a pipeline loads",
        "_load_feature_extractor": "tells transformers what a pipeline loads",
        "_pipeline_calls_generate": "tells transformers that options of generate() are taken",
    },
    "transformers.TextIteratorStreamer": {
        "put(self, value)": "hands out each character at once, where stock waits for a space",
    },
    "transformers.PreTrainedTokenizerFast": {
        "_add_tokens(self, new_tokens, special_tokens=False)": (
            "text may write the tokens that a user adds, but not <s>, </s> and <pad>; the library splits all or none"
        ),
        "_encode_plus(self, text, text_pair=None, add_special_tokens=True, padding_strategy="
        "<PaddingStrategy.DO_NOT_PAD: 'do_not_pad'>, truncation_strategy="
        "<TruncationStrategy.DO_NOT_TRUNCATE: 'do_not_truncate'>, max_length=None, stride=0, "
        "is_split_into_words=False, pad_to_multiple_of=None, padding_side=None, return_tensors=None, "
        "return_token_type_ids=None, return_attention_mask=None, return_overflowing_tokens=False, "
        "return_special_tokens_mask=False, return_offsets_mapping=False, return_length=False, verbose=True, "
        "split_special_tokens=None, **kwargs)": ("puts the token of each row's own target language before its source"),
        "_decode(self, token_ids, skip_special_tokens=False, clean_up_tokenization_spaces=None, **kwargs)": (
            "skips the tokens that a user adds as special ones"
        ),
    },
}

# Private, and used as it is. Operators of torch have no Python signature: theirs is their schema.
USED = {
    "transformers.Seq2SeqTrainer._get_dataloader(self, dataset, description, batch_size, sampler_fn=None, "
    "is_training=False, dataloader_key=None)": "makes a test loader with a sampler of its own",
    "transformers.Seq2SeqTrainer._save_optimizer_and_scheduler(self, output_dir)": "writes its part of a checkpoint",
    "transformers.Seq2SeqTrainer._save_scaler(self, output_dir)": "writes its part of a checkpoint",
    "transformers.Seq2SeqTrainer._finish_current_push(self)": "the last push begins when those before have ended",
    "transformers.TrainingArguments._VALID_DICT_FIELDS": "which fields hold JSON, to refuse text by the field's name",
    "transformers.PreTrainedConfig._attn_implementation": "how transformers tells a model its attention",
    "transformers.PreTrainedConfig._auto_class": "takes back register_for_auto_class(), which has no other way back",
    "transformers.Pipeline._prepare_generate_kwargs(self, generate_kwargs, **overrides)": (
        "gives generate() the options of a call and of the pipeline, as stock pipelines do"
    ),
    "transformers.Pipeline._get_set_generation_params(self, generate_kwargs)": (
        "tells num_return_sequences, wherever it was set"
    ),
    "transformers.GenerationMixin._prepare_generation_config(self, generation_config, **kwargs)": (
        "reads the arguments of a call for our searches, as for transformers' own"
    ),
    "transformers.GenerationMixin._prepare_special_tokens(self, generation_config, kwargs_has_attention_mask=None, "
    "device=None, batch_size=None)": "prepares the ends and the padding for our searches, as for transformers' own",
    "transformers.GenerationMixin._prepare_decoder_input_ids_for_generation(self, batch_size, model_input_name, "
    "model_kwargs, decoder_start_token_id, device=None)": "prepares the prefix for our searches",
    "transformers.GenerationMixin._validate_generated_length(self, generation_config, input_ids_length, "
    "has_default_max_length)": "warns of, or refuses, lengths that cannot be",
    "transformers.GenerationMixin._get_logits_processor(self, generation_config, input_ids_seq_length=None, "
    "encoder_input_ids=None, prefix_allowed_tokens_fn=None, logits_processor=None, device=None, model_kwargs=None, "
    "negative_prompt_ids=None, negative_prompt_attention_mask=None)": "makes transformers' processors for our searches",
    "transformers.GenerationMixin._get_stopping_criteria(self, generation_config, stopping_criteria, "
    "tokenizer=None)": "makes transformers' criteria for our searches",
    "sacrebleu.significance._compute_p_value(stats, real_difference)": "is given back after the tests",
    "argparse.ArgumentParser._get_formatter(self)": "prints the options in groups of our own",
    "torch.Tensor._version": "tells that a weight has changed since it was packed",
    "torch.nn.modules.module._global_forward_hooks": "a hook on all modules must be called: no packed engine",
    "torch.nn.modules.module._global_forward_pre_hooks": "a hook on all modules must be called: no packed engine",
    "torch.cpu._is_avx512_bf16_supported()": "whether bfloat16 is fast here",
    "torch.cpu._is_vnni_supported()": "which instructions the compiled program may use",
    "torch.ops.mkldnn._is_mkldnn_bf16_supported()": "whether bfloat16 is fast here, on ARM",
    "torch.ops.mkldnn._reorder_linear_weight(Tensor self, int? batch_size=None)": "packs weights for oneDNN",
    "torch.ops.mkldnn._linear_pointwise(Tensor X, Tensor W, Tensor? B, str attr, Scalar?[] scalars, str? algorithm)": (
        "multiplies packed weights; torch's public products pack them again in each call"
    ),
    "torch._foreach_lerp_": ("moves all weights of a mean at once, as torch.optim.swa_utils does inside"),
    "torch._inductor.list_mode_options(mode=None, dynamic=None)": "the modes of torch.compile, as documented",
}

# Private attributes of their objects, by the place in their source that makes or reads them.
ASSIGNED = {
    "transformers.Trainer": {
        "_tr_loss": "the loss that is not logged yet, to resume from",
        "_total_loss_scalar": "the loss of the whole run, to resume from",
        "_globalstep_last_logged": "since when the loss is added up, to resume from",
        "_initial_global_step": "where the run began, to report all of it",
        "_signature_columns": "which columns of the rows a batch keeps",
    },
    "transformers.GenerationMixin._prepare_special_tokens": {
        "_decoder_start_token_tensor": "the decoder's first token as transformers has prepared it",
        "_eos_token_tensor": "the ends of a sentence as transformers has prepared them",
        "_pad_token_tensor": "the padding as transformers has prepared it",
    },
    "transformers.GenerationConfig": {
        "_from_model_config": "shows whether a model has a generation_config.json",
    },
    "transformers.PreTrainedModel": {
        "_is_hf_initialized": "keeps the values of loaded rows at initialisation",
        "_tied_weights_keys": "tells transformers which weights are shared",
    },
    "transformers.tokenization_utils_base.PreTrainedTokenizerBase": {
        "_special_tokens_map": "the special tokens by their roles; the public property gives only their texts",
        "_extra_special_tokens": "holds the special tokens that a user has added",
    },
    "transformers.PreTrainedTokenizerFast": {
        "_tokenizer": "the tokenizer of the library `tokenizers`",
    },
    "transformers.Pipeline": {
        "_preprocess_params": "options of the pipeline, for stream(), which does not use __call__",
        "_forward_params": "options of the pipeline, for stream(), which does not use __call__",
        "_postprocess_params": "options of the pipeline, for stream(), which does not use __call__",
    },
    "argparse": {
        "_actions": "the options, to show them in our own groups",
    },
    "torch.nn.Module": {
        "_forward_hooks": "a hook must be called: no packed engine",
        "_forward_pre_hooks": "a hook must be called: no packed engine",
    },
}

# Theirs, and given another value by us.
REPLACED = {
    "transformers.pipelines.PipelineRegistry.check_task(self, task)": (
        'knows "translation_en_to_de" again, which transformers 5 gave up with its own translation pipeline'
    ),
    "sacrebleu.significance._compute_p_value(stats, real_difference)": (
        "a difference as large as the real one counts, too; without it two equal systems differ significantly"
    ),
    "torch.backends.quantized.engine": "int8 weights are packed by fbgemm, then the process has its own engine back",
}
