// Package kms is the vocabulary of Conclave: identifiers, key states, purposes,
// algorithms, actions and error kinds. It imports the standard library alone,
// and everything else imports it.
package kms
