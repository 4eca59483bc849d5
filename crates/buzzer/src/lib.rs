//! Fine-tune Llama 2 on question-and-answer corpora and use the result.
