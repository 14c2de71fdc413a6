// Package interop holds a second verifier of evidence files, in Python and written
// from their documentation (kms/audit/EVIDENCE.md), and the test that it and
// kms/audit judge every file alike. Run it by hand with
//
//	python3 test/interop/evidence.py --cluster ID FILE...
package interop
