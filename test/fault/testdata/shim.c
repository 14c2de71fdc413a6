/*
 * A PKCS#11 library that passes every call on to a real one (REAL) and breaks as
 * the files in a directory (CONTROL) say:
 *
 *   hang      while it is there, no call comes back
 *   norandom  while it is there, C_GenerateRandom fails with CKR_RANDOM_NO_RNG
 *   gone      while it is there, every call fails with CKR_DEVICE_REMOVED
 *   crash     the next call removes it and ends the process with SIGSEGV
 *   closeall  the next call removes it and closes all sessions of all slots first
 *   finalize  the next call removes it and finalises the library first
 *
 * The last two wait until no other call is inside the real library: SoftHSM
 * itself crashes when they meet one.
 */
#define CK_PTR *
#define NULL_PTR 0
#define CK_DEFINE_FUNCTION(type, name) type name
#define CK_DECLARE_FUNCTION(type, name) type name
#define CK_DECLARE_FUNCTION_POINTER(type, name) type(*name)
#define CK_CALLBACK_FUNCTION(type, name) type(*name)
#include "pkcs11.h"

#include <dlfcn.h>
#include <pthread.h>
#include <stdlib.h>
#include <unistd.h>

static CK_FUNCTION_LIST *real, list;
static pthread_rwlock_t gate = PTHREAD_RWLOCK_INITIALIZER;

static int is(const char *file) { return access(file, F_OK) == 0; }
static int once(const char *file) { return unlink(file) == 0; }

static void close_all(void)
{
	CK_SLOT_ID slots[16];
	CK_ULONG n = 16;
	if (real->C_GetSlotList(CK_TRUE, slots, &n) != CKR_OK)
		return;
	for (CK_ULONG i = 0; i < n; i++)
		real->C_CloseAllSessions(slots[i]);
}

static CK_RV enter(void)
{
	while (is(CONTROL "/hang"))
		usleep(5000);
	if (once(CONTROL "/crash")) {
		*(volatile int *)0 = 0;
	}
	if (once(CONTROL "/closeall")) {
		pthread_rwlock_wrlock(&gate);
		close_all();
		pthread_rwlock_unlock(&gate);
	}
	if (once(CONTROL "/finalize")) {
		pthread_rwlock_wrlock(&gate);
		real->C_Finalize(NULL_PTR);
		pthread_rwlock_unlock(&gate);
	}
	if (is(CONTROL "/gone"))
		return CKR_DEVICE_REMOVED;
	pthread_rwlock_rdlock(&gate);
	return CKR_OK;
}

static CK_RV leave(CK_RV rv)
{
	pthread_rwlock_unlock(&gate);
	return rv;
}

#define CALL(name, types, args)                                                \
	static CK_RV shim_##name types                                         \
	{                                                                      \
		CK_RV rv = enter();                                            \
		return rv != CKR_OK ? rv : leave(real->name args);             \
	}
#define S CK_SESSION_HANDLE s
#define O CK_OBJECT_HANDLE
#define M CK_MECHANISM_PTR m
#define B CK_BYTE_PTR
#define U CK_ULONG
#define UP CK_ULONG_PTR
#define T CK_ATTRIBUTE_PTR

#define CALLS(X)                                                               \
	X(C_GetSlotList, (CK_BBOOL a, CK_SLOT_ID_PTR b, UP c), (a, b, c))      \
	X(C_GetTokenInfo, (CK_SLOT_ID a, CK_TOKEN_INFO_PTR b), (a, b))         \
	X(C_GetMechanismInfo, (CK_SLOT_ID a, CK_MECHANISM_TYPE b, CK_MECHANISM_INFO_PTR c), (a, b, c)) \
	X(C_OpenSession, (CK_SLOT_ID a, CK_FLAGS b, CK_VOID_PTR c, CK_NOTIFY d, CK_SESSION_HANDLE_PTR e), (a, b, c, d, e)) \
	X(C_CloseSession, (S), (s))                                            \
	X(C_GetSessionInfo, (S, CK_SESSION_INFO_PTR a), (s, a))                \
	X(C_Login, (S, CK_USER_TYPE a, B b, U c), (s, a, b, c))                \
	X(C_Logout, (S), (s))                                                  \
	X(C_CreateObject, (S, T a, U b, CK_OBJECT_HANDLE_PTR c), (s, a, b, c)) \
	X(C_CopyObject, (S, O o, T a, U b, CK_OBJECT_HANDLE_PTR c), (s, o, a, b, c)) \
	X(C_DestroyObject, (S, O o), (s, o))                                   \
	X(C_GetAttributeValue, (S, O o, T a, U b), (s, o, a, b))               \
	X(C_SetAttributeValue, (S, O o, T a, U b), (s, o, a, b))               \
	X(C_FindObjectsInit, (S, T a, U b), (s, a, b))                         \
	X(C_FindObjects, (S, CK_OBJECT_HANDLE_PTR a, U b, UP c), (s, a, b, c)) \
	X(C_FindObjectsFinal, (S), (s))                                        \
	X(C_EncryptInit, (S, M, O o), (s, m, o))                               \
	X(C_Encrypt, (S, B a, U b, B c, UP d), (s, a, b, c, d))                \
	X(C_DecryptInit, (S, M, O o), (s, m, o))                               \
	X(C_Decrypt, (S, B a, U b, B c, UP d), (s, a, b, c, d))                \
	X(C_SignInit, (S, M, O o), (s, m, o))                                  \
	X(C_Sign, (S, B a, U b, B c, UP d), (s, a, b, c, d))                   \
	X(C_VerifyInit, (S, M, O o), (s, m, o))                                \
	X(C_Verify, (S, B a, U b, B c, U d), (s, a, b, c, d))                  \
	X(C_GenerateKey, (S, M, T a, U b, CK_OBJECT_HANDLE_PTR c), (s, m, a, b, c)) \
	X(C_GenerateKeyPair, (S, M, T a, U b, T c, U d, CK_OBJECT_HANDLE_PTR e, CK_OBJECT_HANDLE_PTR f), (s, m, a, b, c, d, e, f)) \
	X(C_WrapKey, (S, M, O w, O o, B a, UP b), (s, m, w, o, a, b))          \
	X(C_UnwrapKey, (S, M, O w, B a, U b, T c, U d, CK_OBJECT_HANDLE_PTR e), (s, m, w, a, b, c, d, e)) \
	X(C_DeriveKey, (S, M, O o, T a, U b, CK_OBJECT_HANDLE_PTR c), (s, m, o, a, b, c))

CALLS(CALL)

static CK_RV shim_C_GenerateRandom(CK_SESSION_HANDLE s, CK_BYTE_PTR a, CK_ULONG b)
{
	CK_RV rv = enter();
	if (rv != CKR_OK)
		return rv;
	return leave(is(CONTROL "/norandom") ? CKR_RANDOM_NO_RNG : real->C_GenerateRandom(s, a, b));
}

#define PUT(name, types, args) list.name = shim_##name;

CK_RV C_GetFunctionList(CK_FUNCTION_LIST_PTR_PTR out)
{
	if (real == NULL_PTR) {
		void *lib = dlopen(REAL, RTLD_NOW | RTLD_LOCAL);
		CK_C_GetFunctionList get = lib ? (CK_C_GetFunctionList)dlsym(lib, "C_GetFunctionList") : NULL_PTR;
		if (get == NULL_PTR || get(&real) != CKR_OK)
			return CKR_GENERAL_ERROR;
		list = *real;
		CALLS(PUT)
		list.C_GenerateRandom = shim_C_GenerateRandom;
	}
	*out = &list;
	return CKR_OK;
}
