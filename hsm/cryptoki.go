package hsm

/*
#cgo linux LDFLAGS: -ldl
#include <dlfcn.h>
#include <stddef.h>

// What PKCS#11 2.40 section 2 and pkcs11t.h call CK_ULONG, CK_MECHANISM and
// CK_FUNCTION_LIST. The functions come in the order of section 5 (pkcs11f.h).
typedef unsigned long ck_ulong;
typedef struct { ck_ulong mechanism; void *parameter; ck_ulong parameter_len; } ck_mechanism;
typedef struct { unsigned char major, minor; void (*functions[68])(void); } ck_function_list;

enum { c_sign_init = 42, c_sign = 43, ckm_sha256_hmac = 0x251, mac_size = 32, macs_max = 16 };

typedef ck_ulong (*get_function_list)(ck_function_list **);
typedef ck_ulong (*sign_init)(ck_ulong session, ck_mechanism *, ck_ulong key);
typedef ck_ulong (*sign)(ck_ulong session, const unsigned char *data, ck_ulong len, unsigned char *sig, ck_ulong *sig_len);

static ck_function_list *functions_of(const char *path) {
	void *library = dlopen(path, RTLD_LAZY);
	if (library == NULL) return NULL;
	get_function_list get = (get_function_list)dlsym(library, "C_GetFunctionList");
	ck_function_list *list = NULL;
	if (get == NULL || get(&list) != 0) return NULL;
	return list;
}

typedef struct {
	ck_ulong n;
	ck_ulong key[macs_max], end[macs_max]; // end of each message
	unsigned char out[macs_max][mac_size];

	ck_ulong done;   // MACs made
	ck_ulong length; // of the MAC that was refused for it; 0 otherwise
	int      stage;  // c_sign_init or c_sign: what returned an error
} macs;

// make_macs stops at the first error.
static ck_ulong make_macs(ck_function_list *list, ck_ulong session, const unsigned char *messages, macs *m) {
	sign_init init = (sign_init)list->functions[c_sign_init];
	sign finish = (sign)list->functions[c_sign];
	ck_ulong begin = 0;
	for (m->done = 0; m->done < m->n; m->done++) {
		ck_mechanism hmac = { ckm_sha256_hmac, NULL, 0 };
		m->stage = c_sign_init;
		ck_ulong rv = init(session, &hmac, m->key[m->done]);
		if (rv != 0) return rv;
		m->stage = c_sign;
		ck_ulong end = m->end[m->done], len = mac_size;
		rv = finish(session, messages + begin, end - begin, m->out[m->done], &len);
		if (rv != 0) return rv;
		if (len != mac_size) { m->length = len; return 0; }
		begin = end;
	}
	return 0;
}
*/
import "C"

import (
	"fmt"
	"unsafe"

	"github.com/conclave-kms/conclave/kms/secret"
	"github.com/miekg/pkcs11"
)

// functions is the CK_FUNCTION_LIST of a loaded library, for the one thing that goes
// past the binding: HMACs. The binding crosses into C twice for each, asks the token
// for the length of the result first, and leaves the result in freed memory. That
// costs SoftHSM a fifth of its rate.
type functions struct{ list *C.ck_function_list }

// functionsOf returns the functions of a library that the binding has loaded already.
func functionsOf(path string) (functions, bool) {
	name := append([]byte(path), 0)
	list := C.functions_of((*C.char)(unsafe.Pointer(&name[0])))
	return functions{list}, list != nil
}

// maxMACs is how many MACs macBatch holds.
const maxMACs = C.macs_max

// macBatch is up to maxMACs HMACs that are made in one call into the library.
type macBatch struct {
	c        C.macs
	messages []byte
}

// reset empties the batch. What was computed is wiped.
func (b *macBatch) reset() {
	secret.Wipe(unsafe.Slice((*byte)(unsafe.Pointer(&b.c.out)), C.mac_size*b.c.n))
	b.c.n, b.c.done, b.c.length = 0, 0, 0
	b.messages = b.messages[:0]
}

// add takes the message for a loaded key.
func (b *macBatch) add(key pkcs11.ObjectHandle, message []byte) {
	if b.messages == nil {
		b.messages = make([]byte, 0, maxMACs*128) // never nil, which some libraries refuse for an empty message
	}
	b.messages = append(b.messages, message...)
	b.c.key[b.c.n] = C.ck_ulong(key)
	b.c.end[b.c.n] = C.ck_ulong(len(b.messages))
	b.c.n++
}

// mac copies the i-th result.
func (b *macBatch) mac(i int) []byte {
	return append([]byte(nil), unsafe.Slice((*byte)(unsafe.Pointer(&b.c.out[i])), C.mac_size)...)
}

// run makes the MACs (C_SignInit and C_Sign with CKM_SHA256_HMAC, PKCS#11 2.40 section
// 5.11) one after the other and returns how many were made before the first error.
// After an error the session may have an operation under way.
func (b *macBatch) run(s *session) (int, error) {
	rv := C.make_macs(s.fn.list, C.ck_ulong(s.h), (*C.uchar)(unsafe.SliceData(b.messages)), &b.c)
	n := int(b.c.done)
	switch {
	case rv != 0 && b.c.stage == C.c_sign_init:
		return n, fmt.Errorf("C_SignInit: %w", pkcs11.Error(rv))
	case rv != 0:
		return n, fmt.Errorf("C_Sign: %w", pkcs11.Error(rv))
	case b.c.length != 0:
		return n, unavailablef("HMAC: the token returned %d bytes instead of %d", b.c.length, C.mac_size)
	case n != int(b.c.n):
		return n, unavailablef("HMAC: the token returned nothing")
	}
	return n, nil
}
