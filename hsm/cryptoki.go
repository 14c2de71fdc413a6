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

enum { c_sign_init = 42, c_sign = 43, ckm_sha256_hmac = 0x251, mac_size = 32 };

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

// hmac makes one MAC of mac_size bytes. stage says which function refused.
static ck_ulong hmac(ck_function_list *list, ck_ulong session, ck_ulong key, const unsigned char *message, ck_ulong len, unsigned char *out, ck_ulong *out_len, int *stage) {
	ck_mechanism mechanism = { ckm_sha256_hmac, NULL, 0 };
	*stage = c_sign_init;
	ck_ulong rv = ((sign_init)list->functions[c_sign_init])(session, &mechanism, key);
	if (rv != 0) return rv;
	*stage = c_sign;
	*out_len = mac_size;
	return ((sign)list->functions[c_sign])(session, message, len, out, out_len);
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

// noMessage stands for the address of an empty message, which some libraries refuse to be nil.
var noMessage [1]byte

// hmac computes HMAC-SHA-256 with a loaded key: C_SignInit and C_Sign with
// CKM_SHA256_HMAC (PKCS#11 2.40 section 2.19). After an error the session may have an
// operation under way.
func (s *session) hmac(key pkcs11.ObjectHandle, message []byte) ([]byte, error) {
	at := &noMessage[0]
	if len(message) > 0 {
		at = &message[0]
	}
	mac := make([]byte, C.mac_size)
	n, stage := C.ck_ulong(0), C.int(0)
	rv := C.hmac(s.fn.list, C.ck_ulong(s.h), C.ck_ulong(key), (*C.uchar)(at), C.ck_ulong(len(message)), (*C.uchar)(&mac[0]), &n, &stage)
	switch {
	case rv == 0 && n == C.mac_size:
		return mac, nil
	case rv == 0:
		secret.Wipe(mac)
		return nil, unavailablef("HMAC: the token returned %d bytes instead of %d", n, C.mac_size)
	case stage == C.c_sign_init:
		return nil, fmt.Errorf("C_SignInit: %w", pkcs11.Error(rv))
	}
	secret.Wipe(mac)
	return nil, fmt.Errorf("C_Sign: %w", pkcs11.Error(rv))
}
